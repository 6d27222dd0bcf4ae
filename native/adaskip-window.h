#pragma once

#include "adaskip-kv.h"

#include "ggml.h"
#include "llama-graph.h"

#include <map>
#include <optional>

// Attentions that look back at a window: instead of all KV cells they read those of the first positions of the sequence
// and of the last ones before each token, gathered from the cache.

// Where an attention of a graph reads the K and V of a cache.
struct adaskip_kv_reads {
    ggml_tensor * attention = nullptr; // FLASH_ATTN_EXT or SOFT_MAX
    ggml_tensor * kq        = nullptr; // the products around a SOFT_MAX, null for flash attention
    ggml_tensor * kqv       = nullptr;

    const ggml_tensor * k = nullptr; // views of the cache: [n_embd_head, n_kv, n_head_kv]
    const ggml_tensor * v = nullptr; // likewise, or [n_kv, n_embd_head, n_head_kv]

    // Nothing where an attention reads a cache in another way, or several sequences each from their own, or adds a bias
    // that goes by the distance of cells. Null is no attention.
    static std::optional<adaskip_kv_reads> find(ggml_cgraph * gf, ggml_tensor * attention);
};

class adaskip_window_input;

// Makes attentions of one graph look back at a window.
class adaskip_window {
public:
    // n_tokens: of the window, a token itself included; n_sinks: positions at the beginning that are read besides
    adaskip_window(ggml_context * ctx, llm_graph_result & res, const adaskip_kv & kv, int32_t n_tokens, int32_t n_sinks)
        : ctx(ctx), res(res), kv(kv), n_tokens(n_tokens), n_sinks(n_sinks) {}

    void narrow(const adaskip_kv_reads & reads);

    static constexpr int N_TENSORS = 20; // that are added per attention at most, and for all together

private:
    const adaskip_window_input & input_of(const adaskip_kv_reads & reads);

    ggml_context * const ctx;
    llm_graph_result &   res;
    const adaskip_kv &   kv;
    const int32_t        n_tokens;
    const int32_t        n_sinks;

    // by the cache, and whether it is for flash attention
    std::map<std::pair<const llama_kv_cache *, bool>, const adaskip_window_input *> inputs;
};
