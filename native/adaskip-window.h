#pragma once

#include "adaskip-kv.h"

#include "ggml.h"
#include "llama-graph.h"

#include <map>
#include <optional>

// Attentions that look back at a window: they read only the KV cells of the sequence's first positions and of the last
// ones before each token, gathered from the cache. An attention with a sliding window of its own sees what both see.

// the tokens of a layer's own sliding window, 0 for all
int32_t adaskip_sliding_window(const llama_hparams & hparams, int32_t il);

// The places where an attention of a graph reads K and V of a cache.
struct adaskip_kv_reads {
    ggml_tensor * attention = nullptr; // FLASH_ATTN_EXT or SOFT_MAX
    ggml_tensor * kq        = nullptr; // the products around a SOFT_MAX, null for flash attention
    ggml_tensor * kqv       = nullptr;

    const ggml_tensor * k = nullptr; // views of the cache: [n_embd_head, n_kv, n_head_kv]
    const ggml_tensor * v = nullptr; // likewise, or [n_kv, n_embd_head, n_head_kv]

    bool v_has_rows = true; // whether v is likewise

    // Returns nothing for null, and for attentions that read a cache in another way, or one per sequence, or add a bias
    // by the distance of cells.
    static std::optional<adaskip_kv_reads> find(ggml_cgraph * gf, ggml_tensor * attention);
};

class adaskip_window_input;

// Makes attentions of one graph look back at a window.
class adaskip_window {
public:
    // n_tokens: of the window, a token itself included; n_sinks: positions at the beginning that are also read
    adaskip_window(ggml_context * ctx, llm_graph_result & res, const adaskip_kv & kv, int32_t n_tokens, int32_t n_sinks)
        : ctx(ctx), res(res), kv(kv), n_tokens(n_tokens), n_sinks(n_sinks) {}

    // n_own: tokens of the attention's own sliding window, 0 for all; equal for all that read one cache
    void narrow(const adaskip_kv_reads & reads, int32_t n_own);

    static constexpr int N_TENSORS = 20; // the most tensors added per attention

private:
    const adaskip_window_input & input_of(const adaskip_kv_reads & reads, int32_t n_own);

    ggml_context * const ctx;
    llm_graph_result &   res;
    const adaskip_kv &   kv;
    const int32_t        n_tokens;
    const int32_t        n_sinks;

    // by cache, and whether for flash attention
    std::map<std::pair<const llama_kv_cache *, bool>, const adaskip_window_input *> inputs;
};
