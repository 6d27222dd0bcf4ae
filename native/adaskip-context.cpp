#include "adaskip-context.h"

#include "adaskip-llama.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <functional>
#include <limits>

//
// hooks
//

template <typename F> bool adaskip_context::hook(const char * name, F && f) {
    failure = adaskip_try(f);
    if (failure.code != ADASKIP_OK) {
        LLAMA_LOG_ERROR("%s: %s\n", name, failure.message.c_str());
    }
    return failure.code == ADASKIP_OK;
}

bool adaskip_context::begin(const llama_ubatch & ubatch) {
    return hook(__func__, [&] { check(ubatch); });
}

void adaskip_context::check(const llama_ubatch & ubatch) {
    if (!active_set().windowed.empty() && ubatch.n_seqs_unq > 1) {
        throw adaskip_exception(ADASKIP_ERROR_SEQUENCES,
                "the plan has attentions that look back at a window, which read one sequence at a time");
    }
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id    = ubatch.seq_id_unq[s];
        const llama_pos    pos_stale = first_stale(seq_id, phase);
        if (pos_stale < std::numeric_limits<llama_pos>::max()) {
            throw adaskip_exception(ADASKIP_ERROR_KV_STALE, format("position %d of sequence %d was computed under "
                                                                   "another plan, was moved, or lacks the KV of an "
                                                                   "attention that runs now",
                                                                    pos_stale, seq_id));
        }
    }
    kv->set_id = active_set().set_id;
}

llama_pos adaskip_context::first_stale(llama_seq_id seq_id, int32_t i_phase) const {
    const auto & skipped = get_set(i_phase).attention;
    return kv->first_unreadable(seq_id, [&](uint64_t set_id) {
        return adaskip_moves_of(set_id) <= most_moves && plan.is_readable(set_id, skipped);
    });
}

llm_graph_params adaskip_context::graph_params(llm_graph_params params) {
    if (statistics_flags & ADASKIP_STATISTICS_ALL_TOKENS) {
        // makes the last layer's FFN run on every token
        params.n_outputs = params.ubatch.n_tokens;
    }
    has_outputs = params.n_outputs > 0;
    params.cparams.flash_attn &= params.ubatch.n_tokens >= n_flash_least;
    return params;
}

bool adaskip_context::observes_online() const {
    return online.observes() && phase == ADASKIP_PHASE_DECODE;
}

adaskip_context::graph_key adaskip_context::key() const {
    return { active_set().graph_id,
        statistics_flags != 0 || !observes_online() ? statistics_flags : ADASKIP_STATISTICS_ONLINE,
        statistics_flags & ADASKIP_STATISTICS_OF_BULK ? plan.bulk.graph_id : 0, has_outputs, unpacked,
        !repacked.empty() };
}

bool adaskip_context::can_reuse() const {
    return graph_key_last == key() && n_freed_last == adaskip_freed::n;
}

ggml_cgraph * adaskip_context::graph_pass(
        const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype) {
    if (!gf) {
        return nullptr;
    }
    if (!hook(__func__, [&] { rewrite(lctx, gf, res, gtype); })) {
        n_freed_last = -1; // never reuse that graph
        return nullptr;
    }
    return gf;
}

// Without an output token, nodes after the last store into the memory have no reader, except the hidden states that
// llama_context copies for every token.
static void drop_outputs(adaskip_pass & pass, const llm_graph_result & res, const llama_cparams & cparams) {
    for (const auto * t : { res.t_logits, res.t_embd, res.t_embd_pooled, res.t_h_nextn }) {
        pass.drop(t);
    }
    for (const auto * ts : { &res.t_sampled, &res.t_sampled_probs, &res.t_sampled_logits, &res.t_candidates }) {
        for (const auto & t : *ts) {
            pass.drop(adaskip_sampled(t));
        }
    }
    if (res.t_h_nextn && cparams.embeddings_nextn && !cparams.embeddings_nextn_masked) {
        pass.keep(res.t_h_nextn);
    }
    for (size_t il = 0; il < cparams.embeddings_layer_inp.size(); ++il) {
        if (cparams.embeddings_layer_inp[il]) {
            pass.keep(res.t_layer_inp[il]);
        }
    }
}

void adaskip_context::rewrite(
        const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype) {
    observer.clear();

    const graph_key key_new = key();
    n_key_changes += !(key_new == graph_key_last);
    graph_key_last = key_new;
    n_freed_last   = adaskip_freed::n;
    graph_is_new   = true;

    counters.n_nodes_full = ggml_graph_n_nodes(gf);
    counters.n_nodes      = counters.n_nodes_full;

    if (n_key_changes == 0 && n_flash_least == 0 && kv_elided().empty()) {
        return; // nothing was skipped or observed yet: the graphs are llama.cpp's own
    }

    const auto & model    = lctx.get_model();
    const bool   has_stat = graph_key_last.statistics != 0;

    // in an encoder-decoder model, plans and statistics are for the decoder
    const bool is_encoder =
            gtype == LLM_GRAPH_TYPE_ENCODER && llama_model_has_encoder(&model) && llama_model_has_decoder(&model);
    const bool is_plain = active_set().empty() && !has_stat && kv_elided().empty();

    const auto n_layer = (uint32_t) llama_model_n_layer(&model);

    tensors = std::make_unique<adaskip_tensors>(adaskip_graph_max_nodes(n_layer));

    ggml_tensor * const end = is_encoder || is_plain ? nullptr : res.t_embd ? res.t_embd : res.t_logits;

    adaskip_pass pass(tensors->ctx.get(), gf, end, (int) n_layer, active_set(), kv_elided());

    pass.check();
    pass.skip_sublayers();
    pass.narrow_attentions(res, *kv, model.hparams);
    if (n_flash_least > 0) {
        pass.keep_rows_of_v();
    }
    pass.fill_flash_tiles(lctx.n_threads_batch());
    pass.repack_weights(repacked);
    pass.unpack_weights(unpacked, n_layer);

    if (end && has_stat) {
        const bool on_device = observer.reduces_on_device();
        observer.add_to(pass, graph_key_last.statistics, plan.bulk);
        n_key_changes += observer.reduces_on_device() != on_device;
    }
    if (end && statistics_flags & ADASKIP_STATISTICS_ALL_TOKENS) {
        // the outputs have more rows than the batch asked for, and no reader
        pass.drop(res.t_logits);
        res.t_logits = nullptr;
        res.t_embd   = nullptr;
    }
    if (!has_outputs) {
        drop_outputs(pass, res, lctx.get_cparams());
    }
    auto sizes = pass.find_live();

    const bool fits = sizes.size() == unread_inputs.size() &&
                      std::equal(sizes.begin(), sizes.end(), unread_inputs.begin(), std::less_equal<>());
    n_key_changes += !fits;
    unread_inputs    = std::move(sizes);
    counters.n_nodes = pass.rebuild(n_key_changes);
}

bool adaskip_context::end(const llama_context & lctx, const llama_ubatch & ubatch) {
    return hook(__func__, [&] { observe(lctx, ubatch); });
}

void adaskip_context::observe(const llama_context & lctx, const llama_ubatch & ubatch) {
    counters.n_splits = ggml_backend_sched_get_n_splits(lctx.get_sched());
    counters.n_graphs_built += graph_is_new;
    counters.n_graphs_reused += !graph_is_new;
    graph_is_new = false;

    const bool observes = observes_online();

    const auto read = observer.read(lctx, ubatch);
    counters.n_bytes_statistics += observer.n_bytes();
    if (observes) {
        online.accumulate(read.values, ubatch.n_tokens);
    }
    if (statistics_flags != 0 && !read.values.empty()) {
        const adaskip_statistics statistics = {
            /*.n_layer     =*/llama_model_n_layer(&lctx.get_model()),
            /*.n_tokens    =*/(int32_t) ubatch.n_tokens,
            /*.n_embd      =*/(int32_t) llama_model_n_embd(&lctx.get_model()),
            /*.phase       =*/phase == ADASKIP_PHASE_NARROW ? ADASKIP_PHASE_BULK : phase,
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
    if (observes && online.is_full()) {
        online_set = online.finish(active_set());
        if (!online_set.empty()) {
            online_set.graph_id = adaskip_new_graph_id();
        }
    }
}

//
// settings
//

const adaskip_skip_set & adaskip_context::get_set(int32_t i_phase) const {
    if (i_phase == ADASKIP_PHASE_NARROW && !plan.narrow.empty()) {
        return plan.narrow;
    }
    if (i_phase != ADASKIP_PHASE_DECODE) {
        return i_phase == ADASKIP_PHASE_BULK ? plan.bulk : plan.prefill;
    }
    return online_set.empty() ? get_set_of_request() : online_set;
}

const adaskip_skip_set & adaskip_context::get_set_of_request() const {
    const auto & steps = plan.decode;

    size_t i = 0;
    while (i + 1 < steps.size() && steps[i + 1].start <= n_decoded) {
        ++i;
    }
    return steps[i].set;
}

void adaskip_context::set_plan(adaskip_plan_sets value) {
    plan = std::move(value);
    online.set_params(plan.online);
    begin_request();
}

void adaskip_context::begin_request() {
    n_decoded = 0;
    reset_online();
}

void adaskip_context::reset_online() {
    online.reset();
    online_set = {};
}

void adaskip_context::set_phase(int32_t value) {
    phase = value;
}

void adaskip_context::set_statistics(int32_t flags, adaskip_statistics_callback callback, void * user_data) {
    statistics_flags     = flags;
    statistics_callback  = callback;
    statistics_user_data = user_data;
    observer.free_copies();
}
