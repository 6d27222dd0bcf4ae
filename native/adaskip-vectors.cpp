#include "adaskip-context.h"

#include "llama-model.h"

#include <algorithm>
#include <map>
#include <stdexcept>

adaskip_vectors_ptr adaskip_vectors_init(
        const llama_model & model, const std::vector<uint8_t> & skip, const float * data, int64_t ne0, int64_t ne1) {
    const size_t n   = ne0 * ne1;
    auto         res = std::make_shared<adaskip_vectors>();
    res->tensors.assign(skip.size(), nullptr);
    res->data.assign(skip.size() * n, 0.0f);

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    for (size_t i = 0; i < skip.size(); ++i) {
        if (!skip[i]) {
            continue;
        }
        ggml_backend_buffer_type_t buft = model.select_buft((int) i / 2);
        auto &                     ctx  = ctx_map[buft];
        if (!ctx) {
            const ggml_init_params params = {
                /*.mem_size   =*/skip.size() * ggml_tensor_overhead(),
                /*.mem_buffer =*/nullptr,
                /*.no_alloc   =*/true,
            };
            ctx = ggml_init(params);
            res->ctxs.emplace_back(ctx);
        }
        res->tensors[i] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1);
    }
    for (const auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (!buf) {
            throw std::runtime_error("failed to allocate the plan's vectors");
        }
        res->bufs.emplace_back(buf);
    }
    for (size_t i = 0; i < skip.size(); ++i) {
        if (res->tensors[i]) {
            std::copy(data + i * n, data + (i + 1) * n, res->data.begin() + i * n);
            ggml_backend_tensor_set(res->tensors[i], data + i * n, 0, n * sizeof(float));
        }
    }
    return res;
}
