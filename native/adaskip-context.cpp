#include "adaskip-context.h"

#include "adaskip-topology.h"

#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>

//
// hooks
//

bool adaskip_context::begin(const llama_context & lctx, const llama_ubatch & ubatch) {
    error.clear();

    const auto & mask = plans[phase].attention;

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
                    "decode the sequence again from that position", pos_stale, seq_id);
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
    if (statistics_mode == ADASKIP_STATISTICS_TOKENS) {
        // the last layer's FFN then runs on every token
        params.n_outputs = params.ubatch.n_tokens;
    }
    return params;
}

adaskip_context::graph_key adaskip_context::key() const {
    return { plans[phase].id, statistics_mode };
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
    replaced.clear();
    behind.clear();

    graph_key_last = key();
    graph_is_new   = true;

    counters.n_nodes_full = ggml_graph_n_nodes(gf);
    counters.n_nodes      = counters.n_nodes_full;

    const auto & model    = lctx.get_model();
    const bool   has_plan = !plans[phase].empty();

    // where there is a decoder, plans and statistics are about its layers
    const bool is_encoder = gtype == LLM_GRAPH_TYPE_ENCODER &&
        llama_model_has_encoder(&model) && llama_model_has_decoder(&model);

    if ((!has_plan && statistics_mode == ADASKIP_STATISTICS_OFF) || is_encoder) {
        return gf;
    }

    const auto n_layer  = (uint32_t) llama_model_n_layer(&model);
    const auto roots    = adaskip_graph_roots(gf);
    const auto topology = adaskip_topology_find(gf, res.t_embd ? res.t_embd : res.t_logits, (int) n_layer);
    if (!check(topology)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
        return nullptr;
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead()*adaskip_graph_max_nodes(n_layer),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));

    if (has_plan) {
        skip_sublayers(topology, gf);
    }
    if (statistics_mode != ADASKIP_STATISTICS_OFF) {
        add_statistics(topology);
    }

    const ggml_tensor * dropped = nullptr;
    if (statistics_mode == ADASKIP_STATISTICS_TOKENS) {
        // nobody reads the outputs: more rows than the batch asked for
        dropped      = res.t_logits;
        res.t_logits = nullptr;
        res.t_embd   = nullptr;
    }
    rebuild(topology, gf, roots, dropped);

    counters.n_nodes = ggml_graph_n_nodes(gf);

    return gf;
}

void adaskip_context::end(const llama_context & lctx, const llama_ubatch & ubatch) {
    counters.n_graphs_built  += graph_is_new;
    counters.n_graphs_reused += !graph_is_new;
    graph_is_new = false;

    if (reductions.empty() || !statistics_callback) {
        return;
    }

    const int64_t n_tokens = ubatch.n_tokens;

    std::vector<int32_t> outputs; // tokens of the rows that are left behind llama.cpp's gather
    for (int64_t i = 0; i < n_tokens; ++i) {
        if (ubatch.output[i]) {
            outputs.push_back((int32_t) i);
        }
    }

    std::vector<std::vector<float>> rows(reductions.size());
    for (size_t i = 0; i < reductions.size(); ++i) {
        rows[i].resize(ggml_nelements(reductions[i]));
        if (!rows[i].empty()) {
            const size_t n_bytes = rows[i].size()*sizeof(float);
            ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(lctx.get_sched(), reductions[i]);
            ggml_backend_tensor_get_async(backend, reductions[i], rows[i].data(), 0, n_bytes);
            counters.n_bytes_statistics += n_bytes;
        }
    }
    ggml_backend_sched_synchronize(lctx.get_sched());

    std::vector<float> values(observations.size()*2*3*n_tokens, std::numeric_limits<float>::quiet_NaN());
    float * dst = values.data();
    for (const auto & layer : observations) {
        for (const auto & observation : layer) {
            for (const int i : observation) {
                if (i >= 0) {
                    const auto & src = rows[i];
                    if ((int64_t) src.size() == n_tokens) {
                        std::copy(src.begin(), src.end(), dst);
                    } else {
                        for (size_t k = 0; k < std::min(src.size(), outputs.size()); ++k) {
                            dst[outputs[k]] = src[k];
                        }
                    }
                }
                dst += n_tokens;
            }
        }
    }

    const adaskip_statistics statistics = {
        /*.n_layer   =*/ (int32_t) observations.size(),
        /*.n_tokens  =*/ (int32_t) n_tokens,
        /*.phase     =*/ phase,
        /*.positions =*/ ubatch.pos,
        /*.values    =*/ values.data(),
    };
    statistics_callback(&statistics, statistics_user_data);
}

//
// settings
//

void adaskip_context::set_plan(int32_t i_phase, plan value) {
    value.id = 0;
    if (!value.empty()) {
        const auto & other = plans[1 - i_phase];
        const auto & old   = plans[i_phase];
        const auto same = [&](const plan & p) { return p.skip == value.skip && p.scale == value.scale; };

        // equal plans share their graphs
        value.id = same(other) ? other.id : same(old) ? old.id : plan_id_next++;
    }
    plans[i_phase] = std::move(value);
}

void adaskip_context::set_phase(int32_t value) {
    phase = value;
}

void adaskip_context::set_statistics(int32_t mode, adaskip_statistics_callback callback, void * user_data) {
    statistics_mode      = mode;
    statistics_callback  = callback;
    statistics_user_data = user_data;
}
