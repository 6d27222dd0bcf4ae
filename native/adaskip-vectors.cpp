#include "adaskip-vectors.h"

#include "adaskip-error.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <map>

// Every decoded token reads all maps, and BF16 halves their bytes. Channels of the stream differ by many orders of
// magnitude, for which F16 and Q8_0 have too little range. ggml computes BF16 fast on x86. On arm64 it has no NEON code
// for it: a product of BF16 vectors would take five times the instructions of F32 for each number.
static ggml_type decoded_type(const llama_model & model, ggml_backend_buffer_type_t buft) {
#if defined(__x86_64__) || defined(_M_X64)
    const auto & weights = model.tensors_by_name;
    const auto   device  = ggml_backend_buft_get_device(buft); // null for ggml's plain host buffers
    const bool   is_cpu  = ggml_backend_buft_is_host(buft) &&
                           (!device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU);
    if (is_cpu && std::any_of(weights.begin(), weights.end(),
                          [](const auto & weight) { return weight.second->type != GGML_TYPE_F32; })) {
        return GGML_TYPE_BF16;
    }
#else
    GGML_UNUSED(model);
    GGML_UNUSED(buft);
#endif
    return GGML_TYPE_F32;
}

std::atomic<int64_t> adaskip_freed::n = 0;

adaskip_tensors::adaskip_tensors(size_t n) : mem(new uint8_t[n * ggml_tensor_overhead()]) {
    ctx.reset(ggml_init({ n * ggml_tensor_overhead(), mem.get(), /*.no_alloc =*/true }));
}

adaskip_vectors_ptr adaskip_vectors_init(const llama_model & model, const std::vector<uint8_t> & skip,
        const float * data, int64_t ne0, int64_t ne1, bool is_decoded) {
    const size_t n   = ne0 * ne1;
    auto         res = std::make_shared<adaskip_vectors>();
    res->tensors.assign(skip.size(), nullptr);

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    for (size_t i = 0; i < skip.size(); ++i) {
        if (!skip[i]) {
            continue;
        }
        ggml_backend_buffer_type_t buft = model.select_buft((int) i / 2);
        auto &                     ctx  = ctx_map[buft];
        if (!ctx) {
            ctx = res->ctxs.emplace_back(skip.size()).ctx.get();
        }
        res->tensors[i] = ggml_new_tensor_2d(ctx, is_decoded ? decoded_type(model, buft) : GGML_TYPE_F32, ne0, ne1);
    }
    for (const auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (!buf) {
            throw adaskip_exception(ADASKIP_ERROR_MEMORY,
                    format("%s has no room for the plan's vectors", ggml_backend_buft_name(buft)));
        }
        // makes the scheduler compute on the device of these buffers
        ggml_backend_buffer_set_usage(buf, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        res->bufs.emplace_back(buf);
    }
    for (size_t i = 0; i < skip.size(); ++i) {
        if (ggml_tensor * t = res->tensors[i]) {
            adaskip_vector_set(t, data + i * n);
        }
    }
    return res;
}

void adaskip_vector_set(ggml_tensor * t, const float * data) {
    std::vector<uint8_t> values(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, data, values.data(), 0, t->ne[1], t->ne[0], nullptr);
    ggml_backend_tensor_set(t, values.data(), 0, values.size());
}
