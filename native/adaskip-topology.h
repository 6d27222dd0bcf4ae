#pragma once

#include "ggml.h"

#include <array>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

enum adaskip_term_kind {
    ADASKIP_TERM_ATTENTION = 0, // same values as enum adaskip_kind
    ADASKIP_TERM_FFN       = 1,
    ADASKIP_TERM_OTHER     = 2, // a state-space block, a short convolution, anything with a state other than KV
    ADASKIP_TERM_MIXER     = 3, // mixes the stream with earlier tensors, such as per-layer embeddings
};

// One branch that is added to the residual stream.
struct adaskip_term {
    ggml_tensor * node = nullptr;

    adaskip_term_kind kind = ADASKIP_TERM_OTHER;
    int               il   = -1; // the model's last layer whose weights it uses, -1 if there is none

    bool shared        = false; // whether it uses weights of other layers too
    bool reads_earlier = false; // whether it reads tensors computed before its residual

    ggml_tensor * attention = nullptr; // its attention operation, if it has one

    std::vector<ggml_tensor *> weights; // of its layer
    std::vector<ggml_tensor *> caches;  // memory tensors that it reads
    std::vector<ggml_tensor *> stores;  // nodes that write them and have no consumer

    bool is_sublayer() const { return il >= 0 && (kind == ADASKIP_TERM_ATTENTION || kind == ADASKIP_TERM_FFN); }

    // Whether its attention rotates Q by the positions of tokens, and then K too. True if Q is not found.
    bool is_roped() const;

    // names, types and sizes of the weights and of the caches per token, and whether it computes K and V
    std::string shape() const;
};

// One node that adds to the residual stream: out = residual + terms. Parallel attention and FFN are two terms, taken as
// the chain a = residual + attention, out = a + FFN.
struct adaskip_junction {
    ggml_tensor * out      = nullptr;
    ggml_tensor * residual = nullptr;

    std::vector<adaskip_term> terms;
};

struct adaskip_location {
    int         i_junction = -1;
    int         i_term     = -1;
    std::string reason;            // why it cannot be skipped, empty if it can
    bool        is_shared = false; // whether the reason is that other layers read its KV, so it must be kept

    bool skippable(bool keeps_kv) const { return reason.empty() || (keeps_kv && is_shared); }
};

// The residual stream of a graph. It is found by the structure of the graph and the names of the weights ("blk.<il>.",
// the same in every GGUF file), never by the architecture.
struct adaskip_topology {
    std::vector<adaskip_junction>                junctions; // in the order in which they are computed
    std::vector<std::array<adaskip_location, 2>> layers;    // [n_layer][attention, FFN]

    // null if it was not found
    const adaskip_term * term(const adaskip_location & loc) const {
        return loc.i_junction < 0 ? nullptr : &junctions[loc.i_junction].terms[loc.i_term];
    }
};

// end: a node after the last layer, such as the result of the final norm
// elided: [n_layer] or empty, layers without KV; their attention uses another layer's, and must be skipped
adaskip_topology adaskip_topology_find(
        ggml_cgraph * gf, ggml_tensor * end, int n_layer, const std::vector<bool> & elided);

// The layer of a weight by its GGUF name, "blk.7.ffn_up.weight" or "dec.blk.7.attn_q.weight", -1 if it has none. `rest`
// is the name after the layer.
int adaskip_layer_of_weight(const ggml_tensor * t, const char ** rest = nullptr);

// nodes without a consumer in the graph: results, and stores into a memory
std::vector<ggml_tensor *> adaskip_graph_roots(ggml_cgraph * gf);
