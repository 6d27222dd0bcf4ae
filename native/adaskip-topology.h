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
    ADASKIP_TERM_OTHER     = 2, // a state-space block, a short convolution, anything with a state that is no KV
    ADASKIP_TERM_MIXER     = 3, // mixes the stream with what was computed before it, such as per-layer embeddings
};

// One branch that is added to the residual stream.
struct adaskip_term {
    ggml_tensor * node = nullptr;

    adaskip_term_kind kind = ADASKIP_TERM_OTHER;
    int               il   = -1; // the last layer of the model whose weights it uses, -1 if there is none

    bool shared        = false; // whether it uses weights of other layers too
    bool reads_earlier = false; // whether it reads what was computed before its residual and is not that

    ggml_tensor * attention = nullptr; // its attention operation, where it has one

    std::vector<ggml_tensor *> weights; // of its layer
    std::vector<ggml_tensor *> caches;  // memory tensors that it reads
    std::vector<ggml_tensor *> stores;  // nodes that write them and that nothing else consumes

    bool is_sublayer() const { return il >= 0 && (kind == ADASKIP_TERM_ATTENTION || kind == ADASKIP_TERM_FFN); }

    // names, types and sizes of the weights and of what the caches hold per token, and whether it computes K and V
    std::string shape() const;
};

// One node where the residual stream is added to: out = residual + terms. There are two terms where attention and FFN
// are parallel; they are then taken as the chain a = residual + attention, out = a + FFN.
struct adaskip_junction {
    ggml_tensor * out      = nullptr;
    ggml_tensor * residual = nullptr;

    std::vector<adaskip_term> terms;
};

struct adaskip_location {
    int         i_junction = -1;
    int         i_term     = -1;
    std::string reason;            // why it cannot be skipped, empty if it can
    bool        is_shared = false; // whether that is because other layers read its KV, which is to be kept then

    bool skippable(bool keeps_kv) const { return reason.empty() || (keeps_kv && is_shared); }
};

// The residual stream of a graph. It is found from the structure of the graph and from the names of the weights
// ("blk.<il>.", the same in every GGUF file), never from the architecture.
struct adaskip_topology {
    std::vector<adaskip_junction>                junctions; // in the order in which they are computed
    std::vector<std::array<adaskip_location, 2>> layers;    // [n_layer][attention, FFN]

    // null where it was not found
    const adaskip_term * term(const adaskip_location & loc) const {
        return loc.i_junction < 0 ? nullptr : &junctions[loc.i_junction].terms[loc.i_term];
    }
};

// `end` is a node behind the last layer, such as the result of the final norm. Layers in `elided` have no KV of their
// own: their attention was built on that of another layer, and must be skipped.
adaskip_topology adaskip_topology_find(
        ggml_cgraph * gf, ggml_tensor * end, int n_layer, const std::vector<bool> & elided);

// nodes that no other node of the graph consumes: results, and stores into a memory
std::vector<ggml_tensor *> adaskip_graph_roots(ggml_cgraph * gf);
