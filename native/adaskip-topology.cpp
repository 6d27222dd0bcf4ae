// Long because one search follows the stream from the result to the embeddings, and needs everything it finds.

#include "adaskip-topology.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <set>

// no transformer has more nested additions per junction
static constexpr int ADASKIP_MAX_EXPANSIONS = 8;

static const char * kind_name(int kind) {
    return kind == ADASKIP_TERM_ATTENTION ? "attention" : "FFN";
}

int adaskip_layer_of_weight(const ggml_tensor * t, const char ** rest) {
    int il = -1;
    int n  = 0;
    if (sscanf(t->name, "blk.%d.%n", &il, &n) != 1 && sscanf(t->name, "dec.blk.%d.%n", &il, &n) != 1) {
        return -1;
    }
    if (rest) {
        *rest = t->name + n;
    }
    return il;
}

std::string adaskip_term::shape() const {
    const auto describe = [](const char * name, const ggml_tensor * t, int n_dims) {
        std::string res = std::string(name) + " " + ggml_type_name(t->type);
        for (int i = 0; i < n_dims; ++i) {
            res += " " + std::to_string(t->ne[i]);
        }
        return res + "\n";
    };
    std::set<std::string> parts;
    for (const auto * t : weights) {
        const char * name = "";
        adaskip_layer_of_weight(t, &name);
        parts.insert(describe(name, t, GGML_MAX_DIMS));
    }
    for (const auto * t : caches) {
        parts.insert(describe("cache", t, 1)); // without its cells, whose number depends on the context
    }
    if (!stores.empty()) {
        parts.insert("stores\n"); // computes K and V, unlike an attention that reads another layer's
    }
    return std::accumulate(parts.begin(), parts.end(), std::string());
}

bool adaskip_term::is_roped() const {
    const ggml_tensor * kq = attention;
    if (attention && attention->op == GGML_OP_SOFT_MAX) {
        while (kq && kq->op != GGML_OP_MUL_MAT) {
            kq = kq->src[0];
        }
    }
    std::vector<const ggml_tensor *> left = { kq ? kq->src[kq->op == GGML_OP_MUL_MAT] : nullptr };
    if (!left[0]) {
        return true;
    }
    while (!left.empty()) {
        const auto * t = left.back();
        left.pop_back();
        if (t->op == GGML_OP_ROPE) {
            return true;
        }
        // a product with weights is Q's projection; one with an input rotates a Q whose K is quantized
        const bool is_projection = t->op == GGML_OP_MUL_MAT_ID ||
                                   (t->op == GGML_OP_MUL_MAT && !(t->src[0]->flags & GGML_TENSOR_FLAG_INPUT));
        for (const auto * src : t->src) {
            if (src && !is_projection) {
                left.push_back(src);
            }
        }
    }
    return false;
}

static bool is_recurrent_op(ggml_op op) {
    switch (op) {
        case GGML_OP_SSM_CONV:
        case GGML_OP_SSM_SCAN:
        case GGML_OP_RWKV_WKV6:
        case GGML_OP_RWKV_WKV7:
        case GGML_OP_GATED_LINEAR_ATTN:
        case GGML_OP_GATED_DELTA_NET:
            return true;
        default:
            return false;
    }
}

// the soft-max over KQ has a mask, a mixture-of-experts router's has none
static bool is_attention_op(const ggml_tensor * t) {
    return t->op == GGML_OP_FLASH_ATTN_EXT || (t->op == GGML_OP_SOFT_MAX && t->src[1] != nullptr);
}

std::vector<ggml_tensor *> adaskip_graph_roots(ggml_cgraph * gf) {
    std::unordered_set<const ggml_tensor *> consumed;
    const int                               n_nodes = ggml_graph_n_nodes(gf);
    for (int i = 0; i < n_nodes; ++i) {
        for (const auto * src : ggml_graph_node(gf, i)->src) {
            consumed.insert(src);
        }
    }
    std::vector<ggml_tensor *> res;
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (consumed.count(node) == 0) {
            res.push_back(node);
        }
    }
    return res;
}

namespace {

// the part of a graph between the residual and the end of one branch
struct branch_info {
    std::unordered_set<const ggml_tensor *> nodes;
    std::vector<ggml_tensor *>              leafs;

    bool reaches_stream = false; // depends on the residual
    bool reads_earlier  = false; // depends on tensors computed before the residual
    int  n_attention    = 0;
    bool recurrent      = false;

    ggml_tensor * attention = nullptr; // the last attention operation found
};

struct finder {
    ggml_cgraph * gf;
    int           n_layer;

    std::unordered_map<const ggml_tensor *, int>                        index;  // position in the graph
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>> stores; // memory tensor -> its SET_ROWS
    std::unordered_set<const ggml_tensor *> written;                            // memory tensors written in another way

    finder(ggml_cgraph * gf, int n_layer) : gf(gf), n_layer(n_layer) {
        const int n_nodes = ggml_graph_n_nodes(gf);
        for (int i = 0; i < n_nodes; ++i) {
            index[ggml_graph_node(gf, i)] = i;
        }
        for (auto * root : adaskip_graph_roots(gf)) {
            if (root->view_src && is_leaf(root->view_src)) {
                if (root->op == GGML_OP_SET_ROWS) {
                    stores[root->view_src].push_back(root);
                } else {
                    written.insert(root->view_src);
                }
            }
        }
    }

    bool is_leaf(const ggml_tensor * t) const { return index.find(t) == index.end(); }

    // whether t is computed from weights and inputs alone, such as the embeddings of the tokens
    bool is_source(const ggml_tensor * t) const {
        return std::all_of(
                std::begin(t->src), std::end(t->src), [&](const ggml_tensor * src) { return !src || is_leaf(src); });
    }

    int index_of(const ggml_tensor * t) const {
        const auto it = index.find(t);
        return it == index.end() ? -1 : it->second;
    }

    // the tensor before llama.cpp's gather of the output tokens' rows, in the middle of the last layer
    const ggml_tensor * behind_gather(const ggml_tensor * t) const {
        while (t->op == GGML_OP_GET_ROWS && !is_leaf(t->src[0])) {
            t = t->src[0];
        }
        return t;
    }

    branch_info branch(ggml_tensor * end, const ggml_tensor * residual) const {
        branch_info         res;
        const ggml_tensor * base  = behind_gather(residual);
        const int           bound = index_of(base);

        std::vector<ggml_tensor *> todo = { end };
        while (!todo.empty()) {
            ggml_tensor * t = todo.back();
            todo.pop_back();
            if (t == base || t == residual) {
                res.reaches_stream = true;
                continue;
            }
            if (is_leaf(t)) {
                res.leafs.push_back(t);
                continue;
            }
            // tensors computed before the residual are not part of this branch
            if (index_of(t) < bound) {
                res.reads_earlier = true;
                continue;
            }
            if (!res.nodes.insert(t).second) {
                continue;
            }
            if (is_attention_op(t)) {
                res.attention = t;
                ++res.n_attention;
            }
            res.recurrent |= is_recurrent_op(t->op);
            for (auto * src : t->src) {
                if (src) {
                    todo.push_back(src);
                }
            }
        }
        for (const auto * leaf : res.leafs) {
            res.recurrent |= written.count(leaf) > 0;
        }
        return res;
    }

    bool depends(ggml_tensor * t, const ggml_tensor * residual) const {
        return index_of(t) > index_of(behind_gather(residual)) && branch(t, residual).reaches_stream;
    }

    // a bias has the shape of one token's activations, but it is a weight
    bool is_activation(const ggml_tensor * t) const { return !is_leaf(t) || (t->flags & GGML_TENSOR_FLAG_INPUT); }

    bool is_sum(const ggml_tensor * t) const {
        return !is_leaf(t) && t->op == GGML_OP_ADD && ggml_are_same_shape(t, t->src[0]) && is_activation(t->src[0]) &&
               ggml_are_same_shape(t, t->src[1]) && is_activation(t->src[1]);
    }

    // replaces the last computed operand that is a sum by its operands; false if none is a sum
    bool expand(std::vector<ggml_tensor *> & operands) const {
        auto last = operands.end();
        for (auto it = operands.begin(); it != operands.end(); ++it) {
            if (is_sum(*it) && (last == operands.end() || index_of(*it) > index_of(*last))) {
                last = it;
            }
        }
        if (last == operands.end()) {
            return false;
        }
        ggml_tensor * sum = *last;
        *last             = sum->src[0];
        operands.push_back(sum->src[1]);
        return true;
    }

    // whether a sum adds slices of one tensor that has several streams (AltUp)
    bool sums_slices(const ggml_tensor * t) const {
        for (; is_sum(t); t = t->src[0]) {
            for (const auto * src : { t->src[0], t->src[1] }) {
                if (src->op == GGML_OP_VIEW && !is_leaf(src->src[0]) && src->src[0]->ne[2] > src->ne[2]) {
                    return true;
                }
            }
        }
        return false;
    }

    // splits a sum: the operand that all others depend on is the residual
    bool split(ggml_tensor * sum, adaskip_junction & res) const {
        std::vector<ggml_tensor *> operands = { sum->src[0], sum->src[1] };
        for (int i = 0; i < ADASKIP_MAX_EXPANSIONS; ++i) {
            for (auto * residual : operands) {
                const bool found = std::all_of(operands.begin(), operands.end(),
                        [&](ggml_tensor * t) { return t == residual || depends(t, residual); });
                if (found) {
                    res.out      = sum;
                    res.residual = residual;
                    for (auto * t : operands) {
                        if (t != residual) {
                            split_parallel(t, residual, res.terms);
                        }
                    }
                    return true;
                }
            }
            if (!expand(operands)) {
                break;
            }
        }
        return false;
    }

    // splits a sum of attention and FFN that are added before they meet the stream, but not the experts of one FFN
    void split_parallel(ggml_tensor * t, const ggml_tensor * residual, std::vector<adaskip_term> & terms) const {
        if (is_sum(t)) {
            const auto a = branch(t->src[0], residual);
            const auto b = branch(t->src[1], residual);
            if (a.reaches_stream && b.reaches_stream && (a.n_attention > 0) != (b.n_attention > 0)) {
                split_parallel(t->src[0], residual, terms);
                split_parallel(t->src[1], residual, terms);
                return;
            }
        }
        terms.push_back(make_term(t, residual));
    }

    adaskip_term make_term(ggml_tensor * t, const ggml_tensor * residual) const {
        const auto   info = branch(t, residual);
        adaskip_term res;
        res.node = t;
        res.kind = info.recurrent || info.n_attention > 1 ? ADASKIP_TERM_OTHER
                   : info.n_attention == 1                ? ADASKIP_TERM_ATTENTION
                                                          : ADASKIP_TERM_FFN;

        res.reads_earlier = info.reads_earlier;
        res.attention     = info.attention;

        const auto layers = layers_of(info);
        res.il            = layers.empty() ? -1 : *layers.rbegin();
        res.shared        = layers.size() > 1;
        for (auto * leaf : info.leafs) {
            if (adaskip_layer_of_weight(leaf) >= 0) {
                res.weights.push_back(leaf);
            }
            const auto it = stores.find(leaf);
            if (it == stores.end() || std::find(res.caches.begin(), res.caches.end(), leaf) != res.caches.end()) {
                continue;
            }
            res.caches.push_back(leaf);
            for (auto * store : it->second) {
                // a layer with elided KV uses another layer's cache, which has that layer's stores
                if (layers_of(branch(store, residual)) == std::set<int>{ res.il }) {
                    res.stores.push_back(store);
                }
            }
        }
        return res;
    }

    // the model's layers whose weights a branch uses; blocks that predict further tokens have higher numbers
    std::set<int> layers_of(const branch_info & info) const {
        std::set<int> res;
        for (const auto * leaf : info.leafs) {
            const int il = adaskip_layer_of_weight(leaf);
            if (il >= 0 && il < n_layer) {
                res.insert(il);
            }
        }
        return res;
    }

    // the operand with the stream of a node that is not a junction, or null
    ggml_tensor * pass_through(const ggml_tensor * t, bool in_stream) const {
        ggml_tensor * res = nullptr;
        for (auto * src : t->src) {
            if (!src || is_leaf(src)) {
                continue;
            }
            if (res) {
                return nullptr; // two computed operands: more than a change of the stream
            }
            res = src;
        }
        if (!in_stream) {
            return res; // any operation is allowed between the last layer and the result
        }
        switch (t->op) {
            case GGML_OP_GET_ROWS:
            case GGML_OP_SCALE:
            case GGML_OP_MUL:
            case GGML_OP_ADD:
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
            case GGML_OP_CONT:
            case GGML_OP_RESHAPE:
            case GGML_OP_CLAMP:
                return res;
            default:
                return nullptr;
        }
    }
};

// Why the terms of a junction cannot be skipped, else empty. Two must be one attention and one FFN, independent of each
// other.
std::string check_terms(const finder & f, const adaskip_junction & junction) {
    if (junction.out->type != GGML_TYPE_F32) {
        return "its residual stream is not F32";
    }
    const auto & terms = junction.terms;
    if (terms.size() == 1) {
        return "";
    }
    if (terms.size() != 2 || terms[0].kind != ADASKIP_TERM_ATTENTION || terms[1].kind != ADASKIP_TERM_FFN) {
        return "several blocks are added to the residual stream at once in an unknown shape";
    }
    for (size_t i = 0; i < 2; ++i) {
        if (f.branch(terms[i].node, junction.residual).nodes.count(terms[1 - i].node) > 0) {
            return "its parallel blocks build on each other";
        }
    }
    return "";
}

// Small Gemma 4 models add a per-layer embedding of the token, gated by the stream, in the way of an FFN. An FFN reads
// the stream alone. So if exactly one of several terms does, it is the layer's FFN.
void mark_mixers(adaskip_topology & topology) {
    std::vector<std::vector<adaskip_term *>> ffns(topology.layers.size());
    for (auto & junction : topology.junctions) {
        for (auto & term : junction.terms) {
            if (term.il >= 0 && term.kind == ADASKIP_TERM_FFN) {
                ffns[term.il].push_back(&term);
            }
        }
    }
    const auto reads_earlier = [](const adaskip_term * term) { return term->reads_earlier; };
    for (const auto & terms : ffns) {
        if (std::count_if(terms.begin(), terms.end(), reads_earlier) != (int64_t) terms.size() - 1) {
            continue;
        }
        for (auto * term : terms) {
            term->kind = term->reads_earlier ? ADASKIP_TERM_MIXER : term->kind;
        }
    }
}

void locate(
        const finder & f, adaskip_topology & topology, const std::string & stopped, const std::vector<bool> & elided) {
    const int n_layer = (int) topology.layers.size();

    // a layer with elided KV is not a reader of the cache: its attention will be removed
    const auto is_elided = [&](const adaskip_term & term) {
        return term.il >= 0 && term.il < (int) elided.size() && elided[term.il];
    };
    std::unordered_map<const ggml_tensor *, int> n_readers;
    for (const auto & junction : topology.junctions) {
        for (const auto & term : junction.terms) {
            if (is_elided(term)) {
                continue;
            }
            for (const auto * cache : term.caches) {
                n_readers[cache]++;
            }
        }
    }

    std::vector<bool> recurrent(n_layer, false);

    for (size_t ij = 0; ij < topology.junctions.size(); ++ij) {
        const auto & junction = topology.junctions[ij];
        const auto   reason   = check_terms(f, junction);

        for (size_t it = 0; it < junction.terms.size(); ++it) {
            const auto & term = junction.terms[it];
            if (!term.is_sublayer()) {
                if (term.il >= 0 && term.kind == ADASKIP_TERM_OTHER) {
                    recurrent[term.il] = true;
                }
                continue;
            }
            auto & loc = topology.layers[term.il][term.kind];
            if (loc.i_junction >= 0) {
                loc.reason = std::string("this layer has more than one ") + kind_name(term.kind) + " block";
                continue;
            }
            loc.i_junction = (int) ij;
            loc.i_term     = (int) it;
            loc.reason     = term.shared ? "it uses weights of another layer" : reason;
            for (const auto * cache : term.caches) {
                // an attention that only reads the cache leaves no hole
                if (loc.reason.empty() && n_readers[cache] > 1 && !term.stores.empty() && !is_elided(term)) {
                    loc.reason    = "its KV is shared with another layer";
                    loc.is_shared = true;
                }
            }
        }
    }

    for (int il = 0; il < n_layer; ++il) {
        for (int kind = 0; kind < 2; ++kind) {
            auto & loc = topology.layers[il][kind];
            if (loc.i_junction < 0) {
                loc.reason = recurrent[il] ? "this layer has a state-space or convolution block, which carries a state"
                             : !stopped.empty() ? stopped
                                                : std::string("no ") + kind_name(kind) +
                                                          " of this layer was found on the residual stream";
            }
        }
    }
}

} // namespace

adaskip_topology adaskip_topology_find(
        ggml_cgraph * gf, ggml_tensor * end, int n_layer, const std::vector<bool> & elided) {
    adaskip_topology res;
    res.layers.resize(n_layer);

    const finder f(gf, n_layer);

    std::string stopped;
    for (ggml_tensor * cur = end; cur && !f.is_leaf(cur);) {
        adaskip_junction junction;
        if (f.is_sum(cur) && f.split(cur, junction)) {
            // parallel blocks in the order of the chain, whatever the order in the graph
            std::sort(junction.terms.begin(), junction.terms.end(),
                    [](const adaskip_term & a, const adaskip_term & b) { return a.kind < b.kind; });
            cur = junction.residual;
            res.junctions.push_back(std::move(junction));
            continue;
        }
        ggml_tensor * next = f.pass_through(cur, !res.junctions.empty());
        if (!next && !f.is_source(cur)) {
            stopped = f.sums_slices(cur) ? "the model keeps several residual streams, and each layer mixes all of them"
                                         : std::string("the residual stream could not be followed through node ") +
                                                   cur->name + " (" + ggml_op_name(cur->op) + ")";
        }
        cur = next;
    }
    std::reverse(res.junctions.begin(), res.junctions.end());

    mark_mixers(res);
    locate(f, res, stopped, elided);
    return res;
}
