#include "adaskip-repack.h"

#include "adaskip-llama.h"
#include "adaskip-unpack.h"

#include "llama-model.h"

#include <cstring>
#include <map>
#include <new>

// bytes of a block of 32 values: a factor in F16; in Q5_0 the fifth bits of all, then the low bits of values i and
// i + 16 in one byte
static constexpr int ADASKIP_BLOCK      = 32;
static constexpr int ADASKIP_BLOCK_Q5_0 = 2 + 4 + ADASKIP_BLOCK / 2;
static constexpr int ADASKIP_BLOCK_Q8_0 = 2 + ADASKIP_BLOCK;

static void q8_0_of_q5_0(const uint8_t * src, uint8_t * dst, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; ++i, src += ADASKIP_BLOCK_Q5_0, dst += ADASKIP_BLOCK_Q8_0) {
        uint32_t fifth;
        std::memcpy(dst, src, 2);
        std::memcpy(&fifth, src + 2, sizeof(fifth));
        for (int j = 0; j < ADASKIP_BLOCK / 2; ++j) {
            const int low  = (src[6 + j] & 15) | (fifth >> j & 1) << 4;
            const int high = src[6 + j] >> 4 | (fifth >> (j + ADASKIP_BLOCK / 2) & 1) << 4;

            dst[2 + j]                     = (uint8_t) (low - 16);
            dst[2 + j + ADASKIP_BLOCK / 2] = (uint8_t) (high - 16);
        }
    }
}

static ggml_context_ptr new_context(size_t n_tensors) {
    ggml_context_ptr res(ggml_init({ n_tensors * ggml_tensor_overhead(), nullptr, true }));
    if (!res) {
        throw std::bad_alloc();
    }
    return res;
}

static ggml_tensor * new_q8_0(ggml_context * ctx, const ggml_tensor * weight) {
    return ggml_new_tensor_2d(ctx, GGML_TYPE_Q8_0, weight->ne[0], weight->ne[1]);
}

// The first layout of the CPU backend that has products with the Q8_0 copy of a weight; null for none. llama.cpp asks
// in the same way when it loads a model.
static ggml_backend_buffer_type_t layout_of(const ggml_tensor * weight) {
    auto * dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * get = !dev ? nullptr
                      : (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
                                ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (auto * each = get ? get(dev) : nullptr; each && *each; ++each) {
        const auto    ctx = new_context(3);
        ggml_tensor * w   = new_q8_0(ctx.get(), weight);

        const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*each, 0));
        w->buffer = empty.get();

        ggml_tensor * tokens = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, w->ne[0], ADASKIP_UNPACK_LEAST);
        if (empty && ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx.get(), w, tokens))) {
            return *each;
        }
    }
    return nullptr;
}

static std::map<ggml_backend_buffer_type_t, std::vector<const ggml_tensor *>> weights_by_layout(
        const llama_model & model) {
    std::map<ggml_backend_buffer_type_t, std::vector<const ggml_tensor *>> res;
    std::map<std::pair<int64_t, int64_t>, ggml_backend_buffer_type_t>      known;
    for (const auto & [name, weight] : llama_internal_get_tensor_map(&model)) {
        GGML_UNUSED(name);
        if (weight->type != GGML_TYPE_Q5_0 || !adaskip_can_unpack(weight)) {
            continue;
        }
        const auto [it, is_new] = known.try_emplace({ weight->ne[0], weight->ne[1] });
        if (is_new) {
            it->second = layout_of(weight);
        }
        if (it->second) {
            res[it->second].push_back(weight);
        }
    }
    return res;
}

int64_t adaskip_repacked::n_values(const llama_model & model) {
    int64_t res = 0;
    for (const auto & [layout, weights] : weights_by_layout(model)) {
        GGML_UNUSED(layout);
        for (const auto * weight : weights) {
            res += ggml_nelements(weight);
        }
    }
    return res;
}

void adaskip_repacked::add(const llama_model & model) {
    std::vector<uint8_t> values;
    for (const auto & [layout, weights] : weights_by_layout(model)) {
        contexts.push_back(new_context(weights.size()));
        std::vector<ggml_tensor *> added;
        for (const auto * weight : weights) {
            added.push_back(new_q8_0(contexts.back().get(), weight));
            ggml_set_name(added.back(), weight->name);
        }
        buffers.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(contexts.back().get(), layout));
        if (!buffers.back()) {
            throw std::bad_alloc();
        }
        ggml_backend_buffer_set_usage(buffers.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (size_t i = 0; i < weights.size(); ++i) {
            const int64_t n_blocks = ggml_nelements(weights[i]) / ADASKIP_BLOCK;
            values.resize(n_blocks * ADASKIP_BLOCK_Q8_0);
            q8_0_of_q5_0((const uint8_t *) weights[i]->data, values.data(), n_blocks);
            ggml_backend_tensor_set(added[i], values.data(), 0, values.size());
            copies[weights[i]] = added[i];
        }
    }
}

ggml_tensor * adaskip_repacked::find(const ggml_tensor * weight) const {
    const auto it = copies.find(weight);
    return it == copies.end() ? nullptr : it->second;
}
