#pragma once

// Differences between the supported releases of llama.cpp, under the newest one's names. ADASKIP_RELEASE is the third
// number of llama-cpp-python's version.

#include "llama-kv-cells.h"

#include "ggml.h"

#include <set>
#include <utility>

// the (pos, cell) pairs of a sequence, ordered by position
#if ADASKIP_RELEASE >= 36
inline const std::set<std::pair<llama_pos, uint32_t>> & adaskip_seq_pos(
        const llama_kv_cells & cells, llama_seq_id seq_id) {
    return cells.seq_pos_get(seq_id);
}
#else
inline std::set<std::pair<llama_pos, uint32_t>> adaskip_seq_pos(const llama_kv_cells & cells, llama_seq_id seq_id) {
    std::set<std::pair<llama_pos, uint32_t>> res;
    for (uint32_t i = cells.used_min(); i < cells.used_max_p1(); ++i) {
        if (cells.seq_has(i, seq_id)) {
            res.insert({ cells.pos_get(i), i });
        }
    }
    return res;
}
#endif

// a sampled tensor of llm_graph_result, which up to 0.3.34 has a map by sequence
inline const ggml_tensor * adaskip_sampled(const ggml_tensor * t) {
    return t;
}
inline const ggml_tensor * adaskip_sampled(const std::pair<const llama_seq_id, ggml_tensor *> & t) {
    return t.second;
}

#if ADASKIP_RELEASE < 36
inline bool ggml_prec_set_acc(ggml_tensor * t, ggml_prec prec) {
    ggml_mul_mat_set_prec(t, prec);
    return true;
}
#endif

#if ADASKIP_RELEASE < 35
// Adds t and its sources, without a change of GGML_TENSOR_FLAG_COMPUTE because they are not selected. The selected
// tensor `first` is a source of t, so it is in the graph already.
inline void ggml_build_forward_order(ggml_cgraph * gf, ggml_tensor * t) {
    ggml_tensor * first = t;
    while (first->src[0]) {
        first = first->src[0];
    }
    const int32_t flags     = first->flags;
    ggml_tensor * tensors[] = { t, first };
    ggml_build_forward_select(gf, tensors, 2, 1);
    first->flags = flags;
}
#endif
