#include "adaskip-context.h"

#include "adaskip-topology.h"

#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

// the mask of adaskip_elide_kv, for contexts that this thread creates
static thread_local std::vector<bool> kv_elided_next;

void adaskip_elide_kv_next(std::vector<bool> elided) {
    kv_elided_next = std::move(elided);
}

int32_t adaskip_kv_alias(const llama_hparams & hparams, const std::function<bool(int32_t)> & filter, int32_t il) {
    const auto elided = [&](int32_t i) { return i < (int32_t) kv_elided_next.size() && kv_elided_next[i]; };
    if (!elided(il)) {
        return -1;
    }
    int32_t il_first = il; // where no layer of this shape has KV, the first one keeps it
    for (int32_t i = 0; i < (int32_t) hparams.n_layer_all; ++i) {
        if (!hparams.has_kv(i) || (filter && !filter(i)) || hparams.n_embd_k_gqa(i) != hparams.n_embd_k_gqa(il) ||
                hparams.n_embd_v_gqa(i) != hparams.n_embd_v_gqa(il)) {
            continue;
        }
        if (!elided(i)) {
            return i;
        }
        il_first = std::min(il_first, i);
    }
    return il_first == il ? -1 : il_first;
}

adaskip_context::adaskip_context() : kv_elided(kv_elided_next) {
    for (auto & steps : plans) {
        steps.push_back({ 0, {} });
    }
}

//
// hooks
//

bool adaskip_context::begin(const llama_context & lctx, const llama_ubatch & ubatch) {
    error.clear();

    const auto & mask = active_plan().attention;

    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];

        llama_pos pos_min = std::numeric_limits<llama_pos>::max();
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                if (ubatch.seq_id[i][j] == seq_id) {
                    pos_min = std::min(pos_min, ubatch.pos[i]);
                }
            }
        }
        const llama_pos pos_stale = kv.first_stale(seq_id, mask, pos_min);
        if (pos_stale < pos_min) {
            error = format("position %d of sequence %d has no KV for an attention that the plan runs; "
                           "decode the sequence again from that position",
                    pos_stale, seq_id);
            LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
            return false;
        }
    }
    if (lctx.get_memory()) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                kv.record(ubatch.seq_id[i][j], ubatch.pos[i], mask);
            }
        }
    }
    return true;
}

llm_graph_params adaskip_context::graph_params(llm_graph_params params) const {
    if (statistics_flags & ADASKIP_STATISTICS_ALL_TOKENS) {
        // the last layer's FFN then runs on every token
        params.n_outputs = params.ubatch.n_tokens;
    }
    return params;
}

adaskip_context::graph_key adaskip_context::key() const {
    return { active_plan().id,
        statistics_flags != 0 || !observes_online() ? statistics_flags : ADASKIP_STATISTICS_ONLINE };
}

bool adaskip_context::can_reuse() const {
    return graph_key_last == key();
}

ggml_cgraph * adaskip_context::graph_pass(
        const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype) {
    if (!gf) {
        return nullptr;
    }

    reductions.clear();
    observations.clear();
    layer_dots.clear();
    replaced.clear();
    running.clear();
    behind.clear();
    overwritten.clear();

    const graph_key key_new = key();
    n_key_changes += !(key_new == graph_key_last);
    graph_key_last = key_new;
    graph_is_new   = true;

    counters.n_nodes_full = ggml_graph_n_nodes(gf);
    counters.n_nodes      = counters.n_nodes_full;

    if (n_key_changes == 0 && kv_elided.empty()) {
        return gf; // nothing was ever skipped or observed here: the graphs are llama.cpp's own
    }

    const auto & model    = lctx.get_model();
    const bool   has_plan = !active_plan().empty();
    const bool   has_stat = graph_key_last.statistics != 0;

    // where there is a decoder, plans and statistics are about its layers
    const bool is_encoder =
            gtype == LLM_GRAPH_TYPE_ENCODER && llama_model_has_encoder(&model) && llama_model_has_decoder(&model);

    const auto n_layer = (uint32_t) llama_model_n_layer(&model);
    const auto roots   = adaskip_graph_roots(gf);

    const ggml_init_params params = {
        /*.mem_size   =*/ggml_tensor_overhead() * adaskip_graph_max_nodes(n_layer),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx.reset(ggml_init(params));

    adaskip_topology    topology;
    const ggml_tensor * dropped = nullptr;

    if ((has_plan || has_stat || !kv_elided.empty()) && !is_encoder) {
        topology = adaskip_topology_find(gf, res.t_embd ? res.t_embd : res.t_logits, (int) n_layer, kv_elided);
        if (!check(topology)) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
            return nullptr;
        }
        if (has_plan) {
            skip_sublayers(topology, gf);
        }
        if (has_stat) {
            add_statistics(topology, gf);
        }
        if (statistics_flags & ADASKIP_STATISTICS_ALL_TOKENS) {
            // nobody reads the outputs: more rows than the batch asked for
            dropped      = res.t_logits;
            res.t_logits = nullptr;
            res.t_embd   = nullptr;
        }
    }
    rebuild(topology, gf, roots, dropped);

    return gf;
}

void adaskip_context::end(const llama_context & lctx, const llama_ubatch & ubatch) {
    counters.n_graphs_built += graph_is_new;
    counters.n_graphs_reused += !graph_is_new;
    graph_is_new = false;

    const bool observes = observes_online();

    const auto read = read_statistics(lctx, ubatch);
    if (observes) {
        accumulate(read.values, ubatch.n_tokens);
    }
    if (statistics_flags != 0 && !read.values.empty()) {
        const adaskip_statistics statistics = {
            /*.n_layer     =*/(int32_t) observations.size(),
            /*.n_tokens    =*/(int32_t) ubatch.n_tokens,
            /*.n_embd      =*/(int32_t) llama_model_n_embd(&lctx.get_model()),
            /*.phase       =*/phase,
            /*.positions   =*/ubatch.pos,
            /*.values      =*/read.values.data(),
            /*.layer_dot   =*/read.layer_dot.data(),
            /*.sums        =*/read.sums.empty() ? nullptr : read.sums.data(),
            /*.activations =*/read.activations.empty() ? nullptr : read.activations.data(),
        };
        statistics_callback(&statistics, statistics_user_data);
    }
    if (phase == ADASKIP_PHASE_DECODE) {
        n_decoded += (int32_t) ubatch.n_tokens;
    }
    if (observes && online.n_tokens >= online_params.window) {
        finish_online();
    }
}

// a·b of every row; in as many sums as a compiler puts into registers
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

// The values of the reductions of the last graph, which live until the next one is computed. Those in the host's memory
// are read where they are.
std::vector<const float *> adaskip_context::read_reductions(const llama_context & lctx) {
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

// empty where the graph has no statistics
adaskip_context::statistics_values adaskip_context::read_statistics(
        const llama_context & lctx, const llama_ubatch & ubatch) {
    statistics_values res;
    if (reductions.empty()) {
        return res;
    }
    const size_t n_tokens = ubatch.n_tokens;
    const size_t n_embd   = llama_model_n_embd(&lctx.get_model());
    const float  nan      = std::numeric_limits<float>::quiet_NaN();
    const auto   data     = read_reductions(lctx);
    const auto   size     = [&](int i) { return (size_t) ggml_nelements(reductions[i]); };
    for (size_t i = 0; i < data.size(); ++i) {
        counters.n_bytes_statistics += size((int) i) * sizeof(float);
    }

    std::vector<size_t> outputs; // tokens of the rows that are left behind llama.cpp's gather
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
            if (statistics_flags & ADASKIP_STATISTICS_VECTORS) {
                put_sum(res.sums, observation.sum_u);
                put_sum(res.sums, observation.sum_v);
            }
            if (statistics_flags & ADASKIP_STATISTICS_ACTIVATIONS) {
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

//
// settings
//

const adaskip_context::plan & adaskip_context::get_plan(int32_t i_phase) const {
    if (i_phase == ADASKIP_PHASE_PREFILL) {
        return plans[ADASKIP_PHASE_PREFILL].front().value;
    }
    return online.value.empty() ? get_plan_of_request() : online.value;
}

const adaskip_context::plan & adaskip_context::get_plan_of_request() const {
    const auto & steps = plans[ADASKIP_PHASE_DECODE];

    size_t i = 0;
    while (i + 1 < steps.size() && steps[i + 1].start <= n_decoded) {
        ++i;
    }
    return steps[i].value;
}

static bool plan_equals(const adaskip_context::plan & a, const adaskip_context::plan & b) {
    const auto same = [](const adaskip_vectors_ptr & x, const adaskip_vectors_ptr & y) {
        return x == y || (x && y && x->data == y->data);
    };
    return a.skip == b.skip && a.scale == b.scale && same(a.bias, b.bias) && same(a.down, b.down) && same(a.up, b.up);
}

void adaskip_context::set_steps(int32_t i_phase, std::vector<step> steps) {
    for (auto & cur : steps) {
        cur.value.id = 0;
        if (cur.value.empty()) {
            continue;
        }
        // equal plans share their graphs and their vectors
        for (const auto * others : { &plans[0], &plans[1], &steps }) {
            for (const auto & other : *others) {
                if (&other != &cur && other.value.id != 0 && plan_equals(other.value, cur.value)) {
                    cur.value.id   = other.value.id;
                    cur.value.bias = other.value.bias;
                    cur.value.down = other.value.down;
                    cur.value.up   = other.value.up;
                }
            }
        }
        if (cur.value.id == 0) {
            cur.value.id = plan_id_next++;
        }
    }
    plans[i_phase] = std::move(steps);

    // what the online stage chose belongs to the plan that is gone
    if (i_phase == ADASKIP_PHASE_DECODE) {
        online = {};
    }
}

void adaskip_context::set_plan(int32_t i_phase, plan value) {
    set_steps(i_phase, { { 0, std::move(value) } });
}

void adaskip_context::set_decode_schedule(std::vector<step> steps) {
    set_steps(ADASKIP_PHASE_DECODE, std::move(steps));
}

void adaskip_context::set_phase(int32_t value) {
    phase = value;
}

void adaskip_context::set_statistics(int32_t flags, adaskip_statistics_callback callback, void * user_data) {
    statistics_flags     = flags;
    statistics_callback  = callback;
    statistics_user_data = user_data;
    device_copies.clear();
}
