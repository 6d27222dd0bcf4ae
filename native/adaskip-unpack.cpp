#include "adaskip-unpack.h"

#include "adaskip-topology.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#if defined(_MSC_VER) && !defined(__clang__)
#define ADASKIP_F16C
#else
#define ADASKIP_F16C __attribute__((target("avx,f16c")))
#endif

// whether ggml's CPU backend uses it
static bool has_f16c() {
    auto *     dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto *     reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    const auto find =
            reg ? (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features")
                : nullptr;
    for (const auto * it = find ? find(reg) : nullptr; it && it->name; ++it) {
        if (strcmp(it->name, "F16C") == 0) {
            return true;
        }
    }
    return false;
}

// Rounds n values, a multiple of 8. ggml_fp32_to_fp16_row takes 20 times as long: it is not compiled for F16C.
ADASKIP_F16C static void round_to_f16(const float * x, ggml_fp16_t * y, int64_t n) {
    const __m256 most  = _mm256_set1_ps(65504.0f);
    const __m256 least = _mm256_set1_ps(-65504.0f);
    for (int64_t i = 0; i < n; i += 8) {
        // of a NaN and a number, these return the second operand
        const __m256 bounded = _mm256_min_ps(most, _mm256_max_ps(least, _mm256_loadu_ps(x + i)));
        _mm_storeu_si128((__m128i *) (y + i), _mm256_cvtps_ph(bounded, _MM_FROUND_TO_NEAREST_INT));
    }
}
#else
static bool has_f16c() {
    return false;
}

static void round_to_f16(const float * x, ggml_fp16_t * y, int64_t n) {
    ggml_fp32_to_fp16_row(x, y, n);
}
#endif

// a multiple of each type's block
static constexpr int64_t ADASKIP_UNPACKED_AT_ONCE = 1024;

static void to_f16(ggml_tensor * dst, int ith, int nth, void * user_data) {
    GGML_UNUSED(user_data);
    const ggml_tensor * src    = dst->src[0];
    const auto *        traits = ggml_get_type_traits(src->type);
    const int64_t       n      = src->ne[0];

    float values[ADASKIP_UNPACKED_AT_ONCE];
    for (int64_t row = src->ne[1] * ith / nth; row < src->ne[1] * (ith + 1) / nth; ++row) {
        const auto * from = (const char *) src->data + row * src->nb[1];
        auto *       to   = (ggml_fp16_t *) ((char *) dst->data + row * dst->nb[1]);
        if (src->type == GGML_TYPE_F32) {
            round_to_f16((const float *) from, to, n);
            continue;
        }
        for (int64_t i = 0; i < n; i += ADASKIP_UNPACKED_AT_ONCE) {
            const int64_t n_now = std::min(ADASKIP_UNPACKED_AT_ONCE, n - i);
            traits->to_float(from + ggml_row_size(src->type, i), values, n_now);
            round_to_f16(values, to + i, n_now);
        }
    }
}

bool adaskip_can_unpack(const ggml_tensor * t) {
    static const bool f16c = has_f16c();
    if (!f16c || t->op != GGML_OP_NONE || !ggml_is_quantized(t->type) || !ggml_is_matrix(t) || !ggml_is_contiguous(t) ||
            t->ne[0] % 8 != 0 || !ggml_get_type_traits(t->type)->to_float || adaskip_layer_of_weight(t) < 0 ||
            !t->buffer || !ggml_backend_buffer_is_host(t->buffer)) {
        return false;
    }
    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

ggml_tensor * adaskip_to_f16(ggml_context * ctx, ggml_tensor * t) {
    return ggml_custom_4d(ctx, GGML_TYPE_F16, t->ne[0], t->ne[1], 1, 1, &t, 1, to_f16, GGML_N_TASKS_MAX, nullptr);
}
