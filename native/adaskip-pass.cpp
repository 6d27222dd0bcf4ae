#include "adaskip-pass.h"

#include "adaskip-error.h"
#include "adaskip-flash.h"
#include "adaskip-llama.h"
#include "adaskip-unpack.h"

#include "llama-impl.h"

#include <algorithm>
#include <unordered_set>

// At most, per sublayer and again for the whole layer: three reductions, for which two reshapes and two copies; three
// additions, a scale, two products, three nodes for a sum over tokens, and two copies of activations.
static constexpr uint32_t ADASKIP_NODES_PER_SUBLAYER = 24;

static constexpr uint32_t ADASKIP_NODES_OF_V = 3; // cast, transposed weights, product

// most tokens of a ubatch that read V as it is; with more, a transposed copy costs less
static constexpr int64_t ADASKIP_MOST_ROWS = 8;

uint32_t adaskip_graph_max_nodes(uint32_t n_layer) {
    return n_layer * (2 * ADASKIP_NODES_PER_SUBLAYER + adaskip_window::N_TENSORS + ADASKIP_NODES_OF_V +
                             ADASKIP_FLASH_TENSORS + ADASKIP_MOST_UNPACKED) +
           ADASKIP_NODES_PER_SUBLAYER;
}

// turns a node into `src`, but keeps its name and flags, so that its consumers need no change
static void node_become(ggml_tensor * node, const ggml_tensor * src) {
    node->op = src->op;
    std::copy(std::begin(src->op_params), std::end(src->op_params), std::begin(node->op_params));
    std::copy(std::begin(src->src), std::end(src->src), std::begin(node->src));
}

adaskip_pass::adaskip_pass(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * end, int n_layer,
        const adaskip_skip_set & set, const std::vector<bool> & elided)
    : ctx(ctx), gf(gf), topology(end ? adaskip_topology_find(gf, end, n_layer, elided) : adaskip_topology{}), set(set),
      elided(elided), nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf)),
      roots(adaskip_graph_roots(gf)) {
    for (auto * node : nodes) {
        for (auto * src : node->src) {
            if (src && src->flags & GGML_TENSOR_FLAG_INPUT) {
                inputs[node].push_back(src);
            }
        }
    }
}

void adaskip_pass::check() const {
    for (size_t i = 0; i < 2 * topology.layers.size(); ++i) {
        const int    il   = (int) i / 2;
        const int    kind = (int) i % 2;
        const auto & loc  = topology.layers[il][kind];
        if (set.skips(il, kind) && !loc.skippable(set.keeps_kv)) {
            throw adaskip_exception(ADASKIP_ERROR_NOT_SKIPPABLE,
                    format("layer %d: the %s cannot be skipped: %s", il,
                            kind == ADASKIP_ATTENTION ? "attention" : "FFN", loc.reason.c_str()));
        }
        if (kind == ADASKIP_ATTENTION && il < (int) elided.size() && elided[il] && !set.skips(il, kind)) {
            throw adaskip_exception(ADASKIP_ERROR_KV_ELIDED,
                    format("layer %d: the attention would run, but this context has no KV for it", il));
        }
    }
}

ggml_tensor * adaskip_pass::resolve(ggml_tensor * t) const {
    for (auto it = replaced.find(t); it != replaced.end(); it = replaced.find(t)) {
        t = it->second;
    }
    return t;
}

std::pair<ggml_tensor *, ggml_tensor *> adaskip_pass::input_output(const adaskip_term & term) const {
    const auto it = running.find(term.node);
    if (it == running.end()) {
        return { nullptr, nullptr };
    }
    return { resolve(it->second.first), it->second.second };
}

void adaskip_pass::add_output(ggml_tensor * node, ggml_tensor * t) {
    ggml_set_output(t);
    behind[node].push_back(t);
}

void adaskip_pass::skip_sublayers() {
    if (set.empty()) {
        return;
    }
    for (const auto & junction : topology.junctions) {
        if (!is_skipped(junction)) {
            continue;
        }
        ggml_tensor * const out = junction.out;

        // the chain through this junction: adds one sublayer after the other, or its compensation
        ggml_tensor * cur = junction.residual;

        for (const auto & term : junction.terms) {
            if (!is_skipped(term)) {
                ggml_tensor * sum  = ggml_add(ctx, term.node, cur);
                running[term.node] = { cur, sum };
                cur                = sum;
                continue;
            }
            const size_t i     = 2 * term.il + term.kind;
            const float  scale = set.scale[i];

            // FFNs of the online stage have only a scale
            ggml_tensor * const bias = set.bias ? set.bias->tensors[i] : nullptr;
            ggml_tensor * const down = set.down ? set.down->tensors[i] : nullptr;

            if ((scale != 1.0f || down) && !ggml_is_contiguous(cur)) {
                cur = ggml_cont(ctx, cur);
            }
            ggml_tensor * product = nullptr;
            if (down) {
                product = ggml_mul_mat(ctx, set.up->tensors[i], ggml_mul_mat(ctx, down, cur));
            }
            if (scale != 1.0f) {
                cur = ggml_scale(ctx, cur, scale);
            }
            if (bias) {
                cur = ggml_add(ctx, cur, bias);
            }
            if (product) {
                cur = ggml_add(ctx, cur, product);
            }
        }
        if (cur != junction.residual) {
            node_become(out, cur);
            for (auto & [node, input_output] : running) {
                GGML_UNUSED(node);
                if (input_output.second == cur) {
                    input_output.second = out;
                }
            }
        } else if (out->flags & GGML_TENSOR_FLAG_OUTPUT) {
            node_become(out, ggml_scale(ctx, cur, 1.0f)); // llama.cpp reads this very tensor
        } else {
            replaced[out] = cur;
        }
    }

    for (auto * node : nodes) {
        read_replaced(node);
    }
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        read_replaced(t);
    }
}

void adaskip_pass::narrow_attentions(llm_graph_result & res, const adaskip_kv & kv, const llama_hparams & hparams) {
    adaskip_window window(ctx, res, kv, set.window, set.n_sinks);
    for (size_t il = 0; il < topology.layers.size(); ++il) {
        if (!set.is_windowed((int) il)) {
            continue;
        }
        const auto * term  = topology.term(topology.layers[il][ADASKIP_ATTENTION]);
        const auto   reads = adaskip_kv_reads::find(gf, term ? term->attention : nullptr);
        if (!reads) {
            throw adaskip_exception(ADASKIP_ERROR_NOT_SKIPPABLE,
                    format("layer %zu: the attention cannot look back at a window in this ubatch", il));
        }
        window.narrow(*reads, adaskip_sliding_window(hparams, (int32_t) il));
    }
}

void adaskip_pass::keep_rows_of_v() {
    for (auto * node : nodes) {
        const auto * copy = node->op == GGML_OP_MUL_MAT ? node->src[0] : nullptr;
        if (!copy || copy->op != GGML_OP_CONT || copy->src[0]->op != GGML_OP_TRANSPOSE ||
                node->src[1]->type != GGML_TYPE_F32 || node->ne[1] > ADASKIP_MOST_ROWS) {
            continue;
        }
        ggml_tensor * v = ggml_cast(ctx, copy->src[0]->src[0], GGML_TYPE_F32);
        node_become(node, ggml_out_prod(ctx, v, ggml_transpose(ctx, node->src[1])));
    }
}

void adaskip_pass::fill_flash_tiles(int n_threads) {
    adaskip_flash flash(ctx, n_threads);
    for (auto * node : nodes) {
        if (const auto * filled = flash.filled(node)) {
            node_become(node, filled);
        }
    }
}

void adaskip_pass::repack_weights(const adaskip_repacked & repacked) {
    for (auto * node : nodes) {
        auto * const copy = node->op == GGML_OP_MUL_MAT ? repacked.find(node->src[0]) : nullptr;
        if (copy && ggml_is_contiguous(node->src[1])) { // other products cannot read the copy's layout
            node->src[0] = copy;
        }
    }
}

void adaskip_pass::unpack_weights(uint64_t types, uint32_t n_layer) {
    uint32_t n_left = n_layer * ADASKIP_MOST_UNPACKED;

    for (auto * node : nodes) {
        auto * const weight = node->op == GGML_OP_MUL_MAT && n_left > 0 ? node->src[0] : nullptr;
        if (weight && (types >> weight->type & 1) != 0 && adaskip_can_unpack(weight) && ggml_is_matrix(node->src[1]) &&
                node->ne[1] >= ADASKIP_UNPACK_LEAST) {
            node->src[0] = adaskip_unpacked(ctx, weight);
            --n_left;
        }
    }
}

void adaskip_pass::read_replaced(ggml_tensor * node) const {
    for (auto & src : node->src) {
        src = src ? resolve(src) : nullptr;
    }
    if (node->view_src) {
        ggml_tensor * base = resolve(node->view_src);
        if (base != node->view_src) {
            node->view_src = base->view_src ? base->view_src : base;
            node->view_offs += base->view_src ? base->view_offs : 0;
        }
    }
}

bool adaskip_pass::is_skipped(const adaskip_term & term) const {
    return term.is_sublayer() && set.skips(term.il, term.kind);
}

bool adaskip_pass::is_skipped(const adaskip_junction & junction) const {
    return std::any_of(
            junction.terms.begin(), junction.terms.end(), [&](const adaskip_term & t) { return is_skipped(t); });
}

// Adds a node that is allocated and not computed. ggml_gallocr plans by the positions of nodes and leaves. It keeps its
// plan while their numbers stay the same and no node needs more memory than planned. llama.cpp's graphs of one model
// have one shape. Ours change it with the plan, and two different ones may have equally many nodes. ggml also checks
// only tensors that a node reads. But an input without a reader may grow too: the mask, if all attentions are skipped.
// So after every such change one of two markers needs more memory, and ggml plans again. The other needs as much less,
// so the sum stays the same. Sizes repeat every ADASKIP_N_MARKER_SIZES changes, which would matter only if none of the
// graphs between was allocated.
//
// ggml places markers after the inputs and before all other nodes, each at a multiple of 32 bytes. Inputs can be odd
// multiples, such as the id of one output. Markers fill up the cache line of 64 bytes. Else each AVX-512 load of a node
// would cross two cache lines, and SmolLM2 would take a fifth longer for 512 tokens.
static constexpr int64_t ADASKIP_N_MARKER_SIZES = 1024;
static constexpr int64_t ADASKIP_CACHE_LINE     = 64;
static constexpr int64_t ADASKIP_LINE_VALUES    = ADASKIP_CACHE_LINE / (int64_t) sizeof(float);

void adaskip_pass::add_marker(int64_t n_values) {
    ggml_build_forward_order(gf, ggml_arange(ctx, 0.0f, (float) n_values, 1.0f));
}

// Nodes are dead if only a skipped branch needs them. A skipped attention's stores are dead unless K and V are kept.
std::vector<size_t> adaskip_pass::find_live() {
    std::unordered_set<const ggml_tensor *> dead_roots = dropped;
    for (const auto & junction : topology.junctions) {
        for (const auto & term : junction.terms) {
            if (is_skipped(term) && !set.keeps_kv) {
                dead_roots.insert(term.stores.begin(), term.stores.end());
            }
        }
    }

    std::vector<ggml_tensor *> todo = kept;
    for (auto * root : roots) {
        if (dead_roots.count(root) == 0) {
            todo.push_back(root);
        }
    }
    for (const auto & [node, added] : behind) {
        todo.insert(todo.end(), added.begin(), added.end());
    }

    while (!todo.empty()) {
        ggml_tensor * t = todo.back();
        todo.pop_back();
        if (!live.insert(t).second) {
            continue;
        }
        for (auto * src : t->src) {
            if (src) {
                todo.push_back(src);
            }
        }
    }

    std::vector<size_t>                     res;
    std::unordered_set<const ggml_tensor *> seen;
    for (auto * node : nodes) {
        for (const auto * input : inputs[node]) {
            if (live.count(input) == 0 && seen.insert(input).second) {
                res.push_back(ggml_nbytes(input));
            }
        }
    }
    return res;
}

int adaskip_pass::rebuild(int64_t n_changes) {
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        t->flags |= t->op != GGML_OP_NONE ? GGML_TENSOR_FLAG_COMPUTE : 0;
    }
    size_t                                  n_input_bytes = 0;
    std::unordered_set<const ggml_tensor *> seen;
    for (auto * node : nodes) {
        for (const auto * input : inputs[node]) {
            n_input_bytes += seen.insert(input).second ? GGML_PAD(ggml_nbytes(input), ADASKIP_CACHE_LINE / 2) : 0;
        }
    }

    ggml_graph_clear(gf);
    const int64_t n_lines = 1 + n_changes % ADASKIP_N_MARKER_SIZES;
    const int64_t n_fill  = n_input_bytes % ADASKIP_CACHE_LINE / sizeof(float);
    add_marker(n_lines * ADASKIP_LINE_VALUES + n_fill);
    add_marker((1 + ADASKIP_N_MARKER_SIZES - n_lines) * ADASKIP_LINE_VALUES);

    // ggml_build_forward_order does not change GGML_TENSOR_FLAG_COMPUTE, so upstream's deselected branches stay so
    for (auto * node : nodes) {
        if (live.count(node) > 0) {
            ggml_build_forward_order(gf, node);
        }
        const auto it = behind.find(node);
        if (it != behind.end()) {
            for (auto * added : it->second) {
                ggml_build_forward_order(gf, added);
            }
        }
        // llm_graph_result::set_inputs writes every input, so those without a reader need memory too
        for (auto * input : inputs[node]) {
            ggml_build_forward_order(gf, input);
        }
    }

    const int n_markers = 2;
    const int n_nodes   = ggml_graph_n_nodes(gf) - n_markers;

    // avoids llama.cpp's own number of nodes: its reserved plan has room for the markers, so ggml would keep it
    if (n_nodes + n_markers == (int) nodes.size()) {
        add_marker(ADASKIP_LINE_VALUES);
    }
    return n_nodes;
}
