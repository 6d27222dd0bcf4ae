// Long because the nodes in a graph and the reading of their values must be seen side by side.

#include "adaskip-statistics.h"

#include "adaskip-llama.h"
#include "adaskip-pass.h"

#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-model.h"

#include <limits>
#include <map>
#include <numeric>
#include <unordered_map>

// in ubatches of at most this many tokens, the host reduces the statistics
static constexpr int64_t ADASKIP_MAX_TOKENS_ON_HOST = 8;

void adaskip_observer::clear() {
    reductions.clear();
    observations.clear();
    layer_dots.clear();
    overwritten.clear();
}

int64_t adaskip_observer::n_bytes() const {
    int64_t res = 0;
    for (const auto * t : reductions) {
        res += ggml_nelements(t) * (int64_t) sizeof(float);
    }
    return res;
}

//
// the graph
//

// tensors that a node other than a view of them writes to
static std::unordered_set<const ggml_tensor *> find_overwritten(ggml_cgraph * gf) {
    std::unordered_set<const ggml_tensor *> res;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        const bool is_view = node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
                             node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
        if (node->view_src && !is_view) {
            res.insert(node->view_src);
        }
    }
    return res;
}

// the sum of a*b over every row, as a product of matrices with one row each: one pass over memory, and an op that every
// backend has
int adaskip_observer::reduce(adaskip_pass & pass, ggml_tensor * a, ggml_tensor * b, ggml_tensor * node) {
    const auto as_rows = [&](ggml_tensor * t) {
        if (!ggml_is_contiguous(t)) {
            t = ggml_cont(pass.ctx, t);
        }
        return ggml_reshape_3d(pass.ctx, t, t->ne[0], 1, ggml_nrows(t));
    };
    ggml_tensor * a_rows = as_rows(a);
    ggml_tensor * b_rows = a == b ? a_rows : as_rows(b);
    ggml_tensor * res    = ggml_mul_mat(pass.ctx, a_rows, b_rows);

    ggml_prec_set_acc(res, GGML_PREC_F32);

    return add_reduction(pass, res, node);
}

int adaskip_observer::sum_over_tokens(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node) {
    return add_reduction(pass, ggml_sum_rows(pass.ctx, ggml_cont(pass.ctx, ggml_transpose(pass.ctx, t))), node);
}

// an output of the graph keeps its memory, so the stream itself is read unless something overwrites it
int adaskip_observer::values_of(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node) {
    const bool as_is = ggml_is_contiguous(t) && !t->view_src && overwritten.count(t) == 0;
    return add_reduction(pass, as_is ? t : ggml_cont(pass.ctx, t), node);
}

int adaskip_observer::add_reduction(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node) {
    pass.add_output(node, t);
    reductions.push_back(t);
    return (int) reductions.size() - 1;
}

void adaskip_observer::add_to(adaskip_pass & pass, int32_t flags_new, const adaskip_skip_set & bulk) {
    flags = flags_new;

    const bool ffn_only = flags & ADASKIP_STATISTICS_ONLINE;
    const bool vectors  = flags & ADASKIP_STATISTICS_VECTORS;
    const bool copies   = flags & ADASKIP_STATISTICS_ACTIVATIONS;
    const bool of_bulk  = flags & ADASKIP_STATISTICS_OF_BULK;

    const auto & topology = pass.topology;
    const size_t n_layer  = topology.layers.size();
    observations.assign(n_layer, {});
    layer_dots.assign(n_layer, {});
    if (topology.junctions.empty()) {
        return;
    }
    overwritten = find_overwritten(pass.gf);

    // for few tokens, a copy to the host costs less than many small operations
    on_device = ggml_nrows(topology.junctions.front().residual) > ADASKIP_MAX_TOKENS_ON_HOST;

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
            res.reduced =
                    u == v ? once(squares, u, [&] { return reduce(pass, u, u, node); }) : reduce(pass, u, v, node);
        } else {
            res.u = once(values, u, [&] { return values_of(pass, u, node); });
            res.v = once(values, v, [&] { return values_of(pass, v, node); });
        }
        return res;
    };
    const auto sum = [&](ggml_tensor * t, ggml_tensor * node) {
        return on_device && !copies ? once(sums, t, [&] { return sum_over_tokens(pass, t, node); })
                                    : once(values, t, [&] { return values_of(pass, t, node); });
    };

    std::vector<ggml_tensor *> layer_inputs(n_layer, nullptr);

    for (const auto & junction : topology.junctions) {
        ggml_tensor * const out = junction.out;
        if (ggml_is_empty(out)) {
            continue; // the last layer runs on output tokens only, and this ubatch has none
        }
        ggml_tensor * u = pass.resolve(junction.residual);
        for (size_t it = 0; it < junction.terms.size(); ++it) {
            const auto & term = junction.terms[it];
            if (pass.is_skipped(term)) {
                continue;
            }
            ggml_tensor * v = out;
            if (const auto io = pass.input_output(term); io.first) {
                u = io.first;
                v = io.second;
            } else if (it + 1 < junction.terms.size()) {
                v = ggml_add(pass.ctx, term.node, u);
            }

            const bool known = term.is_sublayer() && topology.layers[term.il][term.kind].skippable(true) &&
                               !(of_bulk && !bulk.skips(term.il, term.kind));
            if (known && !(ffn_only && term.kind != ADASKIP_TERM_FFN)) {
                auto & dst = observations[term.il][term.kind];
                if (!of_bulk) {
                    dst.dot  = dot(u, v, out);
                    dst.u_sq = dot(u, u, out);
                    dst.v_sq = dot(v, v, out);
                }
                if (vectors) {
                    dst.sum_u = sum(u, out);
                    dst.sum_v = sum(v, out);
                }
                if (copies) {
                    dst.u = once(values, u, [&] { return values_of(pass, u, out); });
                    dst.v = once(values, v, [&] { return values_of(pass, v, out); });
                }
            }
            if (known && !ffn_only && !of_bulk) {
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

//
// the host
//

// a·b of every row, in as many sums as a compiler puts into registers
static std::vector<float> dot_rows(const float * a, const float * b, size_t n_rows, size_t n) {
    constexpr size_t   n_lanes = 16;
    std::vector<float> res(n_rows);
    for (size_t row = 0; row < n_rows; ++row) {
        const float * x              = a + row * n;
        const float * y              = b + row * n;
        float         lanes[n_lanes] = {};
        size_t        i              = 0;
        for (; i + n_lanes <= n; i += n_lanes) {
            for (size_t k = 0; k < n_lanes; ++k) {
                lanes[k] += x[i + k] * y[i + k];
            }
        }
        for (; i < n; ++i) {
            lanes[0] += x[i] * y[i];
        }
        res[row] = std::accumulate(lanes, lanes + n_lanes, 0.0f);
    }
    return res;
}

static std::vector<float> sum_rows(const float * a, size_t n_rows, size_t n) {
    std::vector<float> res(n);
    for (size_t row = 0; row < n_rows; ++row) {
        for (size_t k = 0; k < n; ++k) {
            res[k] += a[row * n + k];
        }
    }
    return res;
}

// the values of the last graph's reductions, valid until the next computation; only those on other devices are copied
std::vector<const float *> adaskip_observer::read_reductions(const llama_context & lctx) {
    std::vector<const float *> res(reductions.size());
    device_copies.resize(reductions.size());
    for (size_t i = 0; i < reductions.size(); ++i) {
        const size_t n_values = ggml_nelements(reductions[i]);
        if (n_values == 0 || ggml_backend_buffer_is_host(reductions[i]->buffer)) {
            res[i] = (const float *) reductions[i]->data;
            continue;
        }
        device_copies[i].resize(n_values);
        res[i] = device_copies[i].data();

        ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(lctx.get_sched(), reductions[i]);
        ggml_backend_tensor_get_async(backend, reductions[i], device_copies[i].data(), 0, n_values * sizeof(float));
    }
    ggml_backend_sched_synchronize(lctx.get_sched());
    return res;
}

// empty if the graph has no statistics
adaskip_observer::result adaskip_observer::read(const llama_context & lctx, const llama_ubatch & ubatch) {
    result res;
    if (reductions.empty()) {
        return res;
    }
    const size_t n_tokens = ubatch.n_tokens;
    const size_t n_embd   = llama_model_n_embd(&lctx.get_model());
    const float  nan      = std::numeric_limits<float>::quiet_NaN();
    const auto   data     = read_reductions(lctx);
    const auto   size     = [&](int i) { return (size_t) ggml_nelements(reductions[i]); };

    std::vector<size_t> outputs; // tokens of the rows that llama.cpp's gather keeps
    for (size_t i = 0; i < n_tokens; ++i) {
        if (ubatch.output[i]) {
            outputs.push_back(i);
        }
    }
    const auto put_rows = [&](std::vector<float> & dst, const float * rows, size_t n_rows) {
        const size_t begin = dst.size();
        dst.resize(begin + n_tokens, nan);
        for (size_t k = 0; k < n_rows; ++k) {
            dst[begin + (n_rows == n_tokens ? k : outputs.at(k))] = rows[k];
        }
    };
    std::map<std::pair<int, int>, std::vector<float>> products; // of the host
    const auto                                        put_dot = [&](std::vector<float> & dst, const dot_product & p) {
        if (p.u >= 0) {
            auto & rows = products[{ p.u, p.v }];
            if (rows.empty()) {
                rows = dot_rows(data[p.u], data[p.v], ggml_nrows(reductions[p.u]), n_embd);
            }
            put_rows(dst, rows.data(), rows.size());
        } else {
            put_rows(dst, p.reduced >= 0 ? data[p.reduced] : nullptr, p.reduced >= 0 ? size(p.reduced) : 0);
        }
    };
    std::map<int, std::vector<float>> sums; // by reduction: one sublayer's output is the next one's input
    const auto                        put_sum = [&](std::vector<float> & dst, int i) {
        if (i < 0) {
            dst.resize(dst.size() + n_embd, nan);
            return;
        }
        auto & sum = sums[i];
        if (sum.empty()) {
            sum = sum_rows(data[i], size(i) / n_embd, n_embd);
        }
        dst.insert(dst.end(), sum.begin(), sum.end());
    };
    const auto put_values = [&](int i) {
        res.activations.push_back(i >= 0 && size(i) == n_tokens * n_embd ? data[i] : nullptr);
    };
    for (const auto & layer : observations) {
        for (const auto & observation : layer) {
            put_dot(res.values, observation.dot);
            put_dot(res.values, observation.u_sq);
            put_dot(res.values, observation.v_sq);
            if (flags & ADASKIP_STATISTICS_VECTORS) {
                put_sum(res.sums, observation.sum_u);
                put_sum(res.sums, observation.sum_v);
            }
            if (flags & ADASKIP_STATISTICS_ACTIVATIONS) {
                put_values(observation.u);
                put_values(observation.v);
            }
        }
    }
    for (const auto & layer_dot : layer_dots) {
        put_dot(res.layer_dot, layer_dot);
    }
    return res;
}
