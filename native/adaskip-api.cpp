// Long because it has all functions of adaskip.h: each checks its arguments and calls one function of another file.

#include "adaskip.h"

#include "adaskip-error.h"
#include "adaskip-grammar.h"
#include "adaskip-topology.h"
#include "adaskip-unpack.h"
#include "adaskip-window.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <type_traits>

static thread_local std::string last_error;

void adaskip_set_last_error(std::string message) {
    last_error = std::move(message);
}

static int32_t fail(int32_t code, std::string message) {
    adaskip_set_last_error(std::move(message));
    return code;
}

static void require(bool condition, const std::string & message) {
    if (!condition) {
        throw adaskip_exception(ADASKIP_ERROR_ARGUMENT, message);
    }
}

// the same without a string, for when there is no memory
static void require(bool condition, const char * message) {
    if (!condition) {
        throw adaskip_exception(ADASKIP_ERROR_ARGUMENT, message);
    }
}

// runs f, which returns a code or nothing, and turns an exception into a code
template <typename F> static int32_t told(F && f) {
    last_error.clear();
    int32_t res     = ADASKIP_OK;
    auto    failure = adaskip_try([&] {
        if constexpr (std::is_void_v<decltype(f())>) {
            f();
        } else {
            res = f();
        }
    });
    return failure.code == ADASKIP_OK ? res : fail(failure.code, std::move(failure.message));
}

// the same for functions of a context
template <typename F> static int32_t guarded(const llama_context * ctx, F && f) {
    return told([&] {
        require(ctx, "the context is null");
        return f();
    });
}

static bool is_phase(int32_t phase) {
    return phase >= ADASKIP_PHASE_BULK && phase <= ADASKIP_PHASE_NARROW;
}

static int32_t n_layer_of(const llama_context & ctx) {
    return llama_model_n_layer(&ctx.get_model());
}

// builds a graph of a few tokens for its topology
static adaskip_topology sample_topology(llama_context & ctx, std::vector<bool> & windowable) {
    ctx.adaskip.roped.clear();
    ctx.synchronize();
    ctx.sched_reserve();

    llama_memory_context_ptr mctx;
    if (ctx.get_memory()) {
        mctx = ctx.get_memory()->init_full();
        if (!mctx) {
            throw std::runtime_error("failed to initialize the memory module");
        }
    }
    adaskip_topology res;
    ctx.adaskip.look = [&](ggml_cgraph * gf, const llm_graph_result & gf_res) {
        res = adaskip_topology_find(
                gf, gf_res.t_embd ? gf_res.t_embd : gf_res.t_logits, n_layer_of(ctx), ctx.adaskip.kv_elided());
        for (const auto & layer : res.layers) {
            const auto * term = res.term(layer[ADASKIP_ATTENTION]);
            windowable.push_back(term && adaskip_kv_reads::find(gf, term->attention) && ctx.get_cparams().causal_attn);
            ctx.adaskip.roped.push_back(!term || term->is_roped());
        }
    };
    const uint32_t n_seqs   = ctx.n_seq_max();
    const uint32_t n_tokens = 2 * n_seqs;

    // embeddings are pooled over all tokens, so all must be outputs
    const uint32_t n_outputs = ctx.get_cparams().embeddings ? n_tokens : n_seqs;
    const auto     failure =
            adaskip_try([&] { ctx.graph_reserve(n_tokens, n_seqs, n_outputs, mctx.get(), /*split_only =*/true); });

    ctx.adaskip.look = nullptr;
    if (failure.code != ADASKIP_OK) {
        throw adaskip_exception(failure.code, failure.message);
    }
    return res;
}

// the sublayers, found once per context; the graph pass checks each graph again
static const std::vector<adaskip_sublayer> & sublayers_of(llama_context & ctx) {
    if (!ctx.adaskip.sublayers.empty()) {
        return ctx.adaskip.sublayers;
    }
    std::vector<bool> windowable;
    const auto        topology = sample_topology(ctx, windowable);
    const auto &      hparams  = ctx.get_model().hparams;

    std::vector<adaskip_sublayer>                      res;
    std::map<std::pair<int32_t, std::string>, int32_t> shapes; // by window and adaskip_term::shape()
    for (int32_t i = 0; i < 2 * (int32_t) topology.layers.size(); ++i) {
        const auto & loc = topology.layers[i / 2][i % 2];

        adaskip_sublayer sublayer = {};
        sublayer.layer            = i / 2;
        sublayer.kind             = i % 2;
        sublayer.skippable        = loc.skippable(false);
        sublayer.in_bulk          = loc.skippable(true);
        sublayer.shape            = -1;
        if (sublayer.kind == ADASKIP_ATTENTION) {
            sublayer.window = adaskip_sliding_window(hparams, i / 2);

            // other types of windows are chunks, or see later tokens too
            const bool looks_back = sublayer.window == 0 || hparams.swa_type == LLAMA_SWA_TYPE_STANDARD;
            sublayer.windowable   = looks_back && windowable[i / 2];
        }
        if (const auto * term = topology.term(loc)) {
            sublayer.shape =
                    shapes.try_emplace({ sublayer.window, term->shape() }, (int32_t) shapes.size()).first->second;
        }
        snprintf(sublayer.reason, sizeof(sublayer.reason), "%s", loc.reason.c_str());
        res.push_back(sublayer);
    }
    return ctx.adaskip.sublayers = std::move(res);
}

int32_t adaskip_abi_version(void) {
    return ADASKIP_ABI_VERSION;
}

const char * adaskip_last_error(void) {
    return last_error.c_str();
}

size_t adaskip_ggml_tensor_overhead(void) {
    constexpr size_t size_object = 4 * sizeof(void *); // struct ggml_object, which ggml.h does not show
    return size_object + sizeof(ggml_tensor);
}

int32_t adaskip_n_layer(const llama_context * ctx) {
    return guarded(ctx, [&] { return n_layer_of(*ctx); });
}

int32_t adaskip_n_layer_kv(const llama_context * ctx) {
    return guarded(ctx, [&] {
        const auto & hparams = ctx->get_model().hparams;
        int32_t      res     = n_layer_of(*ctx);
        while (res > 0 && !hparams.has_kv(res - 1)) {
            --res;
        }
        return res;
    });
}

int32_t adaskip_n_positions(const llama_context * ctx) {
    return guarded(ctx, [&] {
        const ggml_tensor * learned = ctx->get_model().pos_embd;
        return learned ? (int32_t) learned->ne[1] : 0;
    });
}

int32_t adaskip_sublayers(llama_context * ctx, adaskip_sublayer * out, int32_t n_out) {
    return guarded(ctx, [&] {
        const int32_t n = 2 * n_layer_of(*ctx);
        require(out && n_out == n, format("expected room for %d sublayers, got %d", n, n_out));
        const auto & sublayers = sublayers_of(*ctx);
        std::copy(sublayers.begin(), sublayers.end(), out);
    });
}

int32_t adaskip_set_plan(llama_context * ctx, const adaskip_plan * plan) {
    return guarded(ctx, [&]() -> int32_t {
        if (ctx->n_seq_max() > 1 && plan && (plan->online || plan->n_decode > 1)) {
            return fail(ADASKIP_ERROR_SEQUENCES,
                    format("the plan has %s, which counts the tokens of one request, but the context is for %u "
                           "sequences",
                            plan->online ? "an online stage" : "a schedule", ctx->n_seq_max()));
        }
        const auto & adaskip   = ctx->adaskip;
        const auto & sublayers = plan ? sublayers_of(*ctx) : adaskip.sublayers;

        auto sets = adaskip_plan_init(ctx->get_model(), sublayers, adaskip.kv_elided(), plan, adaskip.get_plan());
        ctx->synchronize(); // the last graph may still read the old plan's vectors
        ctx->adaskip.set_plan(std::move(sets));
        return ADASKIP_OK;
    });
}

int32_t adaskip_bulk_set_ids(llama_context * ctx, const adaskip_plan * plans, uint64_t * ids, int32_t n) {
    return guarded(ctx, [&] {
        require(n >= 0, format("%d plans", n));
        require(n == 0 || (plans && ids), "there are no plans, or there is no room for ids");
        adaskip_plan_bulk_ids(ctx->get_model(), sublayers_of(*ctx), ctx->adaskip.kv_elided(), plans, n, ids);
    });
}

int32_t adaskip_refit(llama_context * ctx, int32_t layer, int32_t kind, const float * up, int32_t n) {
    return guarded(ctx, [&] {
        const auto &  bulk = ctx->adaskip.get_plan().bulk;
        const int64_t i    = 2 * (int64_t) layer + kind;
        require(bulk.refits && bulk.up, "the plan's bulk has no maps that may be replaced");
        require(layer >= 0 && layer < n_layer_of(*ctx) && (kind == 0 || kind == 1) && bulk.up->tensors[i],
                format("layer %d: the plan's bulk has no map of kind %d", layer, kind));
        require(up && n == ggml_nelements(bulk.up->tensors[i]), format("a map of %d values", n));
        for (int32_t k = 0; k < n; ++k) {
            if (!std::isfinite(up[k])) {
                throw adaskip_exception(ADASKIP_ERROR_COMPENSATION, format("layer %d: a value is not finite", layer));
            }
        }
        ctx->synchronize(); // the last graph may still read it
        adaskip_vector_set(bulk.up->tensors[i], up);
    });
}

int32_t adaskip_get_plan_tag(const llama_context * ctx, uint64_t * tag) {
    return guarded(ctx, [&]() -> int32_t {
        if (!tag) {
            return fail(ADASKIP_ERROR_ARGUMENT, "the tag is null");
        }
        *tag = ctx->adaskip.get_plan().tag;
        return ADASKIP_OK;
    });
}

int32_t adaskip_get_online(const llama_context * ctx, adaskip_online_state * state) {
    return guarded(ctx, [&] {
        require(state, "the state is null");
        const auto & online = ctx->adaskip.get_online();
        state->n_tokens     = online.get_n_tokens();
        state->done         = online.is_done();
        const auto & before = ctx->adaskip.get_set_of_request();
        const auto & after  = ctx->adaskip.get_set(ADASKIP_PHASE_DECODE);
        for (int32_t il = 0; il < n_layer_of(*ctx); ++il) {
            if (state->similarity) {
                state->similarity[il] = online.similarity(il);
            }
            if (state->norm_ratio) {
                state->norm_ratio[il] = online.norm_ratio(il);
            }
            if (state->scale) {
                state->scale[il] = online.scale(il);
            }
            if (state->added) {
                state->added[il] = after.skips(il, ADASKIP_FFN) && !before.skips(il, ADASKIP_FFN);
            }
        }
    });
}

int32_t adaskip_begin_request(llama_context * ctx) {
    return guarded(ctx, [&] { ctx->adaskip.begin_request(); });
}

int32_t adaskip_elide_kv(const uint8_t * skipped, int32_t n_layer) {
    return told([&] {
        require(n_layer >= 0 && (!skipped || n_layer > 0), format("invalid number of layers %d", n_layer));
        adaskip_elide_kv_next(skipped ? std::vector<bool>(skipped, skipped + n_layer) : std::vector<bool>());
    });
}

int32_t adaskip_get_elided_kv(const llama_context * ctx, uint8_t * elided, int32_t n_layer) {
    return guarded(ctx, [&] {
        require(elided && n_layer == n_layer_of(*ctx),
                format("expected room for %d layers, got %d", n_layer_of(*ctx), n_layer));
        const auto & mask = ctx->adaskip.kv_elided();
        for (int32_t il = 0; il < n_layer; ++il) {
            elided[il] = il < (int32_t) mask.size() && mask[il];
        }
    });
}

int32_t adaskip_set_phase(llama_context * ctx, int32_t phase) {
    return guarded(ctx, [&] {
        require(is_phase(phase), format("unknown phase %d", phase));
        ctx->adaskip.set_phase(phase);
    });
}

int32_t adaskip_set_statistics(
        llama_context * ctx, int32_t flags, adaskip_statistics_callback callback, void * user_data) {
    return guarded(ctx, [&] {
        const int32_t known = ADASKIP_STATISTICS_ON | ADASKIP_STATISTICS_ALL_TOKENS | ADASKIP_STATISTICS_VECTORS |
                              ADASKIP_STATISTICS_ACTIVATIONS | ADASKIP_STATISTICS_OF_BULK;
        require((flags & ~known) == 0 && (flags == 0 || (flags & ADASKIP_STATISTICS_ON)), "unknown statistics flags");
        require(!(flags & ADASKIP_STATISTICS_OF_BULK) || (flags & ADASKIP_STATISTICS_ACTIVATIONS),
                "statistics of the bulk's sublayers are their inputs and outputs");
        require(flags == 0 || callback, "statistics need a callback");
        ctx->adaskip.set_statistics(flags, callback, user_data);
    });
}

int32_t adaskip_take_failure(llama_context * ctx) {
    return guarded(ctx, [&] {
        auto failure = ctx->adaskip.take_failure();
        if (failure.code != ADASKIP_OK) {
            throw adaskip_exception(failure.code, failure.message);
        }
    });
}

int32_t adaskip_check_grammar(const llama_vocab * vocab, const char * grammar, const char * root) {
    return told([&] {
        require(vocab && grammar && root, "the vocabulary, the grammar or its root is null");
        auto * read = adaskip_grammar_read(
                [&] { return llama_grammar_init_impl(vocab, grammar, root, false, nullptr, 0, nullptr, 0); });
        if (!read) {
            throw adaskip_exception(ADASKIP_ERROR_SAMPLER, adaskip_grammar_reason());
        }
        llama_grammar_free_impl(read);
    });
}

int32_t adaskip_get_counters(const llama_context * ctx, adaskip_counters * out) {
    return guarded(ctx, [&] {
        require(out, "the counters are null");
        *out            = ctx->adaskip.counters;
        out->n_bytes_kv = 0;
        if (ctx->get_memory()) {
            for (const auto & [buft, size] : ctx->get_memory()->memory_breakdown()) {
                GGML_UNUSED(buft);
                out->n_bytes_kv += (int64_t) size;
            }
        }
    });
}

int32_t adaskip_set_flash_least(llama_context * ctx, int32_t n_tokens) {
    return guarded(ctx, [&] {
        require(n_tokens >= 0, format("the number of %d tokens is negative", n_tokens));
        require(!ctx->adaskip.get_kv().has_quantized_v(), "without flash attention, V cannot be quantized");
        ctx->adaskip.n_flash_least = n_tokens;
    });
}

int32_t adaskip_unpackable(const llama_context * ctx, int64_t * out, int32_t n_out) {
    return guarded(ctx, [&] {
        require(out && n_out == ADASKIP_N_TYPES, "the numbers by type are null or not ADASKIP_N_TYPES");
        std::fill(out, out + n_out, 0);
        for (const auto & [name, tensor] : llama_internal_get_tensor_map(&ctx->get_model())) {
            GGML_UNUSED(name);
            if (adaskip_can_unpack(tensor) && !ctx->adaskip.repacked.find(tensor)) {
                out[tensor->type] += ggml_nelements(tensor);
            }
        }
    });
}

int32_t adaskip_repackable(const llama_context * ctx, int64_t * n_values) {
    return guarded(ctx, [&] {
        require(n_values, "the number of values is null");
        *n_values = adaskip_repacked::n_values(ctx->get_model());
    });
}

int32_t adaskip_repack(llama_context * ctx) {
    return guarded(ctx, [&] {
        if (ctx->adaskip.repacked.empty()) { // graphs read these copies
            adaskip_repacked repacked;
            repacked.add(ctx->get_model());
            ctx->adaskip.repacked = std::move(repacked);
        }
    });
}

int32_t adaskip_set_unpacked(llama_context * ctx, uint64_t types) {
    return guarded(ctx, [&] { ctx->adaskip.unpacked = types; });
}

int32_t adaskip_set_most_moves(llama_context * ctx, int32_t most_moves) {
    return guarded(ctx, [&] {
        require(most_moves >= 0, format("the limit of %d moves is negative", most_moves));
        ctx->adaskip.set_most_moves(most_moves);
    });
}

// Whether llama.cpp's shift of K is the rotation by a distance. It also scales all of K if the model's own rotation
// does, and it rotates K of layers that do not rotate theirs. Learned positions cannot be shifted.
static bool shifts_right(llama_context & ctx) {
    const auto & model   = ctx.get_model();
    const auto & hparams = model.hparams;
    const auto & cparams = ctx.get_cparams();
    if (model.pos_embd) {
        return false;
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return true;
    }
    sublayers_of(ctx);
    for (int32_t il = 0; il < n_layer_of(ctx); ++il) {
        if (!hparams.has_kv(il)) {
            continue;
        }
        float scale = cparams.yarn_attn_factor;
        if (cparams.yarn_ext_factor != 0.0f) { // as in ggml's rope_yarn
            scale *= 1.0f + 0.1f * std::log(1.0f / model.get_rope_freq_scale(cparams, il));
        }
        if (std::fabs(scale - 1.0f) > 1e-4f || !ctx.adaskip.roped[il]) {
            return false;
        }
    }
    return true;
}

int32_t adaskip_can_move(llama_context * ctx) {
    return guarded(ctx, [&]() -> int32_t {
        const auto & kv = ctx->adaskip.get_kv();
        return !kv.caches.empty() && kv.states.empty() && ctx->get_memory()->get_can_shift() && shifts_right(*ctx);
    });
}

static void check_sequence(const llama_context & ctx, int32_t seq_id) {
    require(seq_id >= 0 && seq_id < (int32_t) ctx.n_seq_max(),
            format("no sequence %d, the context is for %u", seq_id, ctx.n_seq_max()));
}

int32_t adaskip_set_aside(
        llama_context * ctx, int32_t seq_id, int32_t n_kept, const adaskip_run * runs, int32_t n_runs) {
    return guarded(ctx, [&] {
        check_sequence(*ctx, seq_id);
        require(adaskip_can_move(ctx) == 1, "the cells of this memory cannot be moved");
        require(n_kept >= 0 && n_runs >= 0 && (runs || n_runs == 0), "the runs are null, or a number is negative");
        const std::vector<adaskip_run> all(runs, runs + n_runs);
        for (const auto & run : all) {
            require(run.n > 0 && run.from >= n_kept && run.to >= n_kept && run.from <= INT32_MAX - run.n &&
                            run.to <= INT32_MAX - run.n && run.n_moves >= (run.from != run.to) &&
                            run.n_moves <= ADASKIP_MOST_MOVES,
                    format("invalid run of %d positions from %d to %d, %d moves", run.n, run.from, run.to,
                            run.n_moves));
        }
        for (const auto start : { &adaskip_run::from, &adaskip_run::to }) {
            auto sorted = all;
            std::sort(sorted.begin(), sorted.end(),
                    [&](const adaskip_run & a, const adaskip_run & b) { return a.*start < b.*start; });
            for (size_t i = 1; i < sorted.size(); ++i) {
                require(sorted[i - 1].*start + sorted[i - 1].n <= sorted[i].*start, "two runs overlap");
            }
        }
        ctx->synchronize();
        ctx->adaskip.get_kv().set_aside(seq_id, n_kept, all);
    });
}

int32_t adaskip_take_back(llama_context * ctx, int32_t seq_id, int32_t end) {
    return guarded(ctx, [&] {
        check_sequence(*ctx, seq_id);
        ctx->adaskip.get_kv().take_back(seq_id, end);
    });
}

int32_t adaskip_kv_first_stale(const llama_context * ctx, int32_t seq_id, int32_t phase, int32_t * pos) {
    return guarded(ctx, [&]() -> int32_t {
        if (!is_phase(phase) || !pos) {
            return fail(ADASKIP_ERROR_ARGUMENT, !pos ? "the position is null" : format("unknown phase %d", phase));
        }
        check_sequence(*ctx, seq_id);
        *pos = ctx->adaskip.first_stale(seq_id, phase);
        return ADASKIP_OK;
    });
}
