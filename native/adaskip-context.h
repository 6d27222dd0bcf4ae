#pragma once

#include "adaskip.h"
#include "adaskip-error.h"
#include "adaskip-kv.h"
#include "adaskip-online.h"
#include "adaskip-pass.h"
#include "adaskip-plan.h"
#include "adaskip-repack.h"
#include "adaskip-statistics.h"

#include "llama-graph.h"

#include <functional>
#include <memory>
#include <utility>
#include <vector>

// The part of a llama_context that skips sublayers and collects statistics. llama.cpp calls its hooks around the
// computation of each ubatch. Without a plan and statistics they leave the graph as llama.cpp built it.
class adaskip_context {
public:
    //
    // hooks of llama_context::process_ubatch; an exception in one fails the ubatch
    //

    // refuses a ubatch that would read an unreadable position, else tells the memory the set of its cells
    bool begin(const llama_ubatch & ubatch);

    // the parameters to build the graph with
    llm_graph_params graph_params(llm_graph_params params);

    // whether the last graph was built under the settings in force, and no buffer was freed since then
    bool can_reuse() const;

    // rewrites a new graph; null on failure
    ggml_cgraph * graph_pass(
            const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype);

    // passes the statistics of the computed ubatch to the callback; false on failure
    bool end(const llama_context & lctx, const llama_ubatch & ubatch);

    //
    // settings
    //

    void set_plan(adaskip_plan_sets value);
    void set_phase(int32_t value);
    void begin_request();
    void set_statistics(int32_t flags, adaskip_statistics_callback callback, void * user_data);

    // allows reading positions that count at most this many moves
    void set_most_moves(int32_t value) {
        most_moves = value;
        kv->moves  = value > 0;
    }

    uint32_t n_flash_least = 0; // ubatches of fewer tokens do without flash attention
    uint64_t unpacked      = 0; // bits of ggml_type: weights that products with many tokens read as F32

    adaskip_repacked repacked; // weights whose copies all products read

    const adaskip_plan_sets & get_plan() const { return plan; }

    // the set under which the next token of this phase runs
    const adaskip_skip_set & get_set(int32_t phase) const;

    // the decode set of this request, without what the online stage added
    const adaskip_skip_set & get_set_of_request() const;

    // the first position of the sequence that may not be read in this phase, INT32_MAX if there is none
    llama_pos first_stale(llama_seq_id seq_id, int32_t phase) const;

    const adaskip_online & get_online() const { return online; }

    const adaskip_kv & get_kv() const { return *kv; }

    // attentions without KV in this context, [n_layer] or empty
    const std::vector<bool> & kv_elided() const { return kv->elided; }

    adaskip_counters counters = {};

    std::vector<adaskip_sublayer> sublayers; // [n_layer][2], empty until the first use
    std::vector<bool>             roped;     // [n_layer], known with them: see adaskip_term

    // runs llama_context::encode or decode, and turns their exceptions into a failure
    template <typename F> int32_t guard(F && f) {
        int32_t ret    = -3;
        auto    caught = adaskip_try([&] { ret = f(); });
        if (caught.code != ADASKIP_OK) {
            failure = std::move(caught);
        }
        return ret;
    }

    // Called with a graph of llama_context::graph_reserve before the scheduler splits it. After that, nodes read copies
    // where devices meet, and the residual stream cannot be followed.
    void look_at(ggml_cgraph * gf, const llm_graph_result & res) const {
        if (look) {
            look(gf, res);
        }
    }

    std::function<void(ggml_cgraph * gf, const llm_graph_result & res)> look; // null unless a graph is wanted

    // returns the last failure, and forgets it
    adaskip_failure take_failure() { return std::exchange(failure, {}); }

private:
    template <typename F> bool hook(const char * name, F && f);

    void check(const llama_ubatch & ubatch);
    void rewrite(const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype);
    void observe(const llama_context & lctx, const llama_ubatch & ubatch);

    adaskip_failure failure;

    // the settings that a graph depends on
    struct graph_key {
        uint64_t graph_id    = 0;
        int32_t  statistics  = 0;
        uint64_t observed_id = 0; // graph_id of the bulk set, if its sublayers alone are observed
        bool     has_outputs = true;
        uint64_t unpacked    = 0;
        bool     is_repacked = false;

        bool operator==(const graph_key & other) const {
            return graph_id == other.graph_id && statistics == other.statistics && observed_id == other.observed_id &&
                   has_outputs == other.has_outputs && unpacked == other.unpacked && is_repacked == other.is_repacked;
        }
    };

    graph_key key() const;
    bool      observes_online() const;
    void      reset_online();

    const adaskip_skip_set & active_set() const { return get_set(phase); }

    adaskip_freed freed; // the context frees its KV with it

    const adaskip_kv_ptr kv = adaskip_kv_create();

    adaskip_plan_sets plan;

    int32_t phase     = ADASKIP_PHASE_PREFILL;
    int32_t n_decoded = 0; // tokens decoded in this request

    int32_t most_moves = 0; // of a readable position

    adaskip_online   online;
    adaskip_skip_set online_set; // the decode set with the FFNs of the online stage, empty if it added none

    int32_t                     statistics_flags     = 0;
    adaskip_statistics_callback statistics_callback  = nullptr;
    void *                      statistics_user_data = nullptr;

    //
    // the last graph that the pass rewrote
    //

    graph_key graph_key_last;
    int64_t   n_freed_last  = 0;
    int64_t   n_key_changes = 0; // graphs before and after a change have different shapes
    bool      graph_is_new  = false;

    std::vector<size_t> unread_inputs; // bytes of each input that no node of that graph reads

    bool has_outputs = true; // whether the ubatch has output tokens

    std::unique_ptr<adaskip_tensors> tensors; // added by the pass

    adaskip_observer observer;
};
