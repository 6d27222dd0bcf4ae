// The graph pass: takes the skipped sublayers out of a graph and adds the reductions that the statistics need.

#include "adaskip-context.h"
#include "adaskip-topology.h"

#include "llama-impl.h"

#include <algorithm>

// per sublayer at most: three reductions, two reshapes, two copies to make them possible, three additions, a scale, two
// products, three nodes for a sum over tokens and two copies of activations; and as much again for the whole layer
static constexpr uint32_t ADASKIP_NODES_PER_SUBLAYER = 24;

uint32_t adaskip_graph_max_nodes(uint32_t n_layer) {
    return 2 * n_layer * ADASKIP_NODES_PER_SUBLAYER + ADASKIP_NODES_PER_SUBLAYER;
}

// makes a node compute what `src` would, under its own name and flags, so that its consumers need no change
static void node_become(ggml_tensor * node, const ggml_tensor * src) {
    node->op = src->op;
    std::copy(std::begin(src->op_params), std::end(src->op_params), std::begin(node->op_params));
    std::copy(std::begin(src->src), std::end(src->src), std::begin(node->src));
}

bool adaskip_context::check(const adaskip_topology & topology) {
    const auto & plan = active_plan();
    for (size_t i = 0; i < 2 * topology.layers.size(); ++i) {
        const int    il   = (int) i / 2;
        const int    kind = (int) i % 2;
        const auto & loc  = topology.layers[il][kind];
        if (plan.skips(il, kind) && !loc.skippable()) {
            error = format("layer %d: the %s cannot be skipped: %s", il,
                    kind == ADASKIP_ATTENTION ? "attention" : "FFN", loc.reason.c_str());
            return false;
        }
        if (kind == ADASKIP_ATTENTION && il < (int) kv_elided.size() && kv_elided[il] && !plan.skips(il, kind)) {
            error = format("layer %d: the attention would run, but this context has no KV for it", il);
            return false;
        }
    }
    return true;
}

ggml_tensor * adaskip_context::resolve(ggml_tensor * t) const {
    for (auto it = replaced.find(t); it != replaced.end(); it = replaced.find(t)) {
        t = it->second;
    }
    return t;
}

void adaskip_context::skip_sublayers(const adaskip_topology & topology, ggml_cgraph * gf) {
    const auto & plan = active_plan();

    for (const auto & junction : topology.junctions) {
        if (!is_skipped(junction)) {
            continue;
        }
        ggml_tensor * const out = junction.out;

        // the chain through this junction: one sublayer after the other is added, or stands in for by its compensation
        ggml_tensor * cur = junction.residual;

        for (const auto & term : junction.terms) {
            if (!is_skipped(term)) {
                ggml_tensor * sum  = ggml_add(ctx.get(), term.node, cur);
                running[term.node] = { cur, sum };
                cur                = sum;
                continue;
            }
            const size_t i     = 2 * term.il + term.kind;
            const float  scale = plan.scale[i];

            // FFNs that the online stage added have a scale alone
            ggml_tensor * const bias = plan.bias ? plan.bias->tensors[i] : nullptr;
            ggml_tensor * const down = plan.down ? plan.down->tensors[i] : nullptr;

            if ((scale != 1.0f || down) && !ggml_is_contiguous(cur)) {
                cur = ggml_cont(ctx.get(), cur);
            }
            ggml_tensor * product = nullptr;
            if (down) {
                product = ggml_mul_mat(ctx.get(), plan.up->tensors[i], ggml_mul_mat(ctx.get(), down, cur));
            }
            if (scale != 1.0f) {
                cur = ggml_scale(ctx.get(), cur, scale);
            }
            if (bias) {
                cur = ggml_add(ctx.get(), cur, bias);
            }
            if (product) {
                cur = ggml_add(ctx.get(), cur, product);
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
            node_become(out, ggml_scale(ctx.get(), cur, 1.0f)); // somebody reads this very tensor
        } else {
            replaced[out] = cur;
        }
    }

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        read_replaced(ggml_graph_node(gf, i));
    }
    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        read_replaced(t);
    }
}

void adaskip_context::read_replaced(ggml_tensor * node) const {
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

bool adaskip_context::is_skipped(const adaskip_term & term) const {
    return term.il >= 0 && term.kind != ADASKIP_TERM_OTHER && active_plan().skips(term.il, term.kind);
}

bool adaskip_context::is_skipped(const adaskip_junction & junction) const {
    return std::any_of(
            junction.terms.begin(), junction.terms.end(), [&](const adaskip_term & t) { return is_skipped(t); });
}

// sum over a row of a*b, for every row: a product of matrices with one row each, one pass over memory and one op that
// every backend has
int adaskip_context::reduce(ggml_tensor * a, ggml_tensor * b, ggml_tensor * node) {
    const auto as_rows = [&](ggml_tensor * t) {
        if (!ggml_is_contiguous(t)) {
            t = ggml_cont(ctx.get(), t);
        }
        return ggml_reshape_3d(ctx.get(), t, t->ne[0], 1, ggml_nrows(t));
    };
    ggml_tensor * a_rows = as_rows(a);
    ggml_tensor * b_rows = a == b ? a_rows : as_rows(b);
    ggml_tensor * res    = ggml_mul_mat(ctx.get(), a_rows, b_rows);

    ggml_prec_set_acc(res, GGML_PREC_F32);

    return add_reduction(res, node);
}

int adaskip_context::sum_over_tokens(ggml_tensor * t, ggml_tensor * node) {
    return add_reduction(ggml_sum_rows(ctx.get(), ggml_cont(ctx.get(), ggml_transpose(ctx.get(), t))), node);
}

// as an output of the graph a tensor keeps its memory, so that the stream itself is read where nothing overwrites it
int adaskip_context::values_of(ggml_tensor * t, ggml_tensor * node) {
    const bool as_is = ggml_is_contiguous(t) && !t->view_src && overwritten.count(t) == 0;
    return add_reduction(as_is ? t : ggml_cont(ctx.get(), t), node);
}

// tensors that a node other than a view of them writes to
void adaskip_context::find_overwritten(ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        const bool is_view = node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
                             node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
        if (node->view_src && !is_view) {
            overwritten.insert(node->view_src);
        }
    }
}

int adaskip_context::add_reduction(ggml_tensor * t, ggml_tensor * node) {
    ggml_set_output(t);
    behind[node].push_back(t);
    reductions.push_back(t);
    return (int) reductions.size() - 1;
}

void adaskip_context::add_statistics(const adaskip_topology & topology, ggml_cgraph * gf) {
    const bool ffn_only = graph_key_last.statistics & ADASKIP_STATISTICS_ONLINE;
    const bool vectors  = graph_key_last.statistics & ADASKIP_STATISTICS_VECTORS;
    const bool copies   = graph_key_last.statistics & ADASKIP_STATISTICS_ACTIVATIONS;

    const size_t n_layer = topology.layers.size();
    observations.assign(n_layer, {});
    layer_dots.assign(n_layer, {});
    if (topology.junctions.empty()) {
        return;
    }
    find_overwritten(gf);

    // few tokens are reduced by the host, as copying them costs less than so many small operations
    const bool on_device = ggml_nrows(topology.junctions.front().residual) > ADASKIP_MAX_TOKENS_ON_HOST;
    n_key_changes += on_device != reduced_on_device;
    reduced_on_device = on_device;

    // the output of one sublayer is the input of the next
    using memo = std::unordered_map<const ggml_tensor *, int>;
    memo       squares, sums, values;
    const auto once = [](memo & known, ggml_tensor * t, const auto & f) {
        const auto it = known.find(t);
        return it != known.end() ? it->second : known[t] = f();
    };
    const auto dot = [&](ggml_tensor * u, ggml_tensor * v, ggml_tensor * node) {
        dot_product res;
        if (on_device) {
            res.reduced = u == v ? once(squares, u, [&] { return reduce(u, u, node); }) : reduce(u, v, node);
        } else {
            res.u = once(values, u, [&] { return values_of(u, node); });
            res.v = once(values, v, [&] { return values_of(v, node); });
        }
        return res;
    };
    const auto sum = [&](ggml_tensor * t, ggml_tensor * node) {
        return on_device && !copies ? once(sums, t, [&] { return sum_over_tokens(t, node); })
                                    : once(values, t, [&] { return values_of(t, node); });
    };

    std::vector<ggml_tensor *> layer_inputs(n_layer, nullptr);

    for (const auto & junction : topology.junctions) {
        ggml_tensor * const out = junction.out;
        if (ggml_is_empty(out)) {
            continue; // no token of this ubatch is an output, and the last layer runs on those only
        }
        ggml_tensor * u = resolve(junction.residual);
        for (size_t it = 0; it < junction.terms.size(); ++it) {
            const auto & term = junction.terms[it];
            if (is_skipped(term)) {
                continue;
            }
            ggml_tensor * v  = out;
            const auto    io = running.find(term.node);
            if (io != running.end()) {
                u = resolve(io->second.first);
                v = io->second.second;
            } else if (it + 1 < junction.terms.size()) {
                v = ggml_add(ctx.get(), term.node, u);
            }

            const bool known =
                    term.il >= 0 && term.kind != ADASKIP_TERM_OTHER && topology.layers[term.il][term.kind].skippable();
            if (known && !(ffn_only && term.kind != ADASKIP_TERM_FFN)) {
                auto & dst = observations[term.il][term.kind];
                dst.dot    = dot(u, v, out);
                dst.u_sq   = dot(u, u, out);
                dst.v_sq   = dot(v, v, out);
                if (vectors) {
                    dst.sum_u = sum(u, out);
                    dst.sum_v = sum(v, out);
                }
                if (copies) {
                    dst.u = once(values, u, [&] { return values_of(u, out); });
                    dst.v = once(values, v, [&] { return values_of(v, out); });
                }
            }
            if (known && !ffn_only) {
                if (term.kind == ADASKIP_TERM_ATTENTION) {
                    layer_inputs[term.il] = u;
                } else if (layer_inputs[term.il] && ggml_are_same_shape(layer_inputs[term.il], v)) {
                    layer_dots[term.il] = dot(layer_inputs[term.il], v, out);
                }
            }
            u = v;
        }
    }
}

// A node that is allocated and not computed. ggml_gallocr keeps its allocation plan, which goes by the position of a
// node or leaf in the graph, while the number of both stays the same and no node needs more memory than it was planned
// for. llama.cpp's graphs of one model have one shape, so that suffices; ours change it with the plan, and two that
// differ may well have equally many nodes. A first node that needs more memory after every such change makes ggml plan
// anew.
void adaskip_context::add_marker(ggml_cgraph * gf, int64_t n_values) {
    ggml_build_forward_order(gf, ggml_arange(ctx.get(), 0.0f, (float) n_values, 1.0f));
}

// Lists the live nodes again, in the order in which llama.cpp had them. Dead are the nodes that only a skipped branch
// needs, and the stores of a skipped attention.
void adaskip_context::rebuild(const adaskip_topology & topology, ggml_cgraph * gf,
        const std::vector<ggml_tensor *> & roots, const ggml_tensor * dropped) {
    static const std::vector<uint8_t> nothing;
    const auto &                      skip = topology.layers.empty() ? nothing : active_plan().skip;

    std::vector<ggml_tensor *> nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf));

    std::unordered_set<const ggml_tensor *> dead_roots = { dropped };
    for (size_t i = 0; i < skip.size(); ++i) {
        if (skip[i]) {
            const auto & loc  = topology.layers[i / 2][i % 2];
            const auto & term = topology.junctions[loc.i_junction].terms[loc.i_term];
            dead_roots.insert(term.stores.begin(), term.stores.end());
        }
    }

    std::vector<ggml_tensor *> todo;
    for (auto * root : roots) {
        if (dead_roots.count(root) == 0) {
            todo.push_back(root);
        }
    }
    for (const auto & [node, added] : behind) {
        todo.insert(todo.end(), added.begin(), added.end());
    }

    std::unordered_set<const ggml_tensor *> live;
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

    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        t->flags |= t->op != GGML_OP_NONE ? GGML_TENSOR_FLAG_COMPUTE : 0;
    }

    ggml_graph_clear(gf);
    add_marker(gf, n_key_changes + 1);

    // ggml_build_forward_order leaves GGML_TENSOR_FLAG_COMPUTE as it is, also on branches that upstream has deselected
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
        // llm_graph_result::set_inputs writes every input, so those of dead nodes need memory too
        for (auto * src : node->src) {
            if (src && (src->flags & GGML_TENSOR_FLAG_INPUT)) {
                ggml_build_forward_order(gf, src);
            }
        }
    }

    counters.n_nodes = ggml_graph_n_nodes(gf) - 1;

    // the plan that llama.cpp reserves for its own graph has room for everything, the first marker included
    if (ggml_graph_n_nodes(gf) == counters.n_nodes_full) {
        add_marker(gf, 1);
    }
}
