#pragma once

#include "adaskip-kv.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;

// One array per skipped sublayer of a plan, each in a buffer on its layer's own device.
struct adaskip_vectors {
    std::vector<ggml_tensor *>           tensors; // [n_layer][2], null where there is none
    std::vector<float>                   data;    // [ne1][ne0] of each tensor there is
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};

using adaskip_vectors_ptr = std::shared_ptr<adaskip_vectors>;

// uploads data[n_layer][2][ne1][ne0] where skip is 1, maps in BF16 where that is faster and the model's own weights are
// no F32 either; throws if a device has no room
adaskip_vectors_ptr adaskip_vectors_init(const llama_model & model, const std::vector<uint8_t> & skip,
        const float * data, int64_t ne0, int64_t ne1, bool is_map);

// The sublayers that are skipped at once, and what stands in for each: an adaskip_plan with its vectors uploaded.
struct adaskip_skip_set {
    std::vector<uint8_t>   skip;      // [n_layer][2], empty: run everything
    std::vector<float>     scale;     // [n_layer][2]
    adaskip_kv::layer_mask attention; // [n_layer], attentions that are skipped

    adaskip_vectors_ptr bias; // null for none
    adaskip_vectors_ptr down; // likewise, [n_embd, n_rank] each
    adaskip_vectors_ptr up;   // [n_rank, n_embd] each

    uint64_t id = 0; // what a graph was built under; 0 for the empty set

    bool empty() const { return skip.empty(); }
    bool skips(int il, int kind) const { return !skip.empty() && skip[2 * il + kind]; }
};
