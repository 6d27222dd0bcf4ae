#pragma once

#include "adaskip.h"
#include "adaskip-kv.h"

#include "ggml-cpp.h"
#include "llama-graph.h"

#include <array>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_context;
struct adaskip_junction;
struct adaskip_term;
struct adaskip_topology;

// room for the nodes that the pass adds to a graph, see llama_context::graph_max_nodes
uint32_t adaskip_graph_max_nodes(uint32_t n_layer);

// The part of a llama_context that skips sublayers and collects statistics. Its hooks are called around the computation
// of each ubatch; with no plan and no statistics they leave the graph as llama.cpp built it.
class adaskip_context {
public:
    struct plan {
        std::vector<uint8_t>   skip;      // [n_layer][2], empty: run everything
        std::vector<float>     scale;     // [n_layer][2]
        adaskip_kv::layer_mask attention; // [n_layer], attentions that are skipped

        uint64_t id = 0; // equal for equal plans

        bool empty() const { return skip.empty(); }
    };

    //
    // hooks of llama_context::process_ubatch
    //

    // refuses a ubatch that would read KV which was never written, else records what its positions will lack
    bool begin(const llama_context & lctx, const llama_ubatch & ubatch);

    // the parameters to build the graph with
    llm_graph_params graph_params(llm_graph_params params) const;

    // whether the last graph was built under the settings in force
    bool can_reuse() const;

    // rewrites a graph that was just built; null on failure
    ggml_cgraph * graph_pass(const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype);

    // hands out the statistics of the ubatch that was just computed
    void end(const llama_context & lctx, const llama_ubatch & ubatch);

    //
    // settings
    //

    void set_plan(int32_t phase, plan value);
    void set_phase(int32_t value);
    void set_statistics(int32_t mode, adaskip_statistics_callback callback, void * user_data);

    const plan & get_plan(int32_t phase) const { return plans[phase]; }

    adaskip_counters counters = {};
    adaskip_kv       kv;

    std::vector<adaskip_sublayer> sublayers; // [n_layer][2], empty until somebody asks

    std::string error; // why the last hook failed

private:
    // the settings that a graph depends on
    struct graph_key {
        uint64_t plan_id    = 0;
        int32_t  statistics = ADASKIP_STATISTICS_OFF;

        bool operator==(const graph_key & other) const {
            return plan_id == other.plan_id && statistics == other.statistics;
        }
    };

    // where the three reductions of one sublayer are in `reductions`, -1 if it is not observed
    using observation = std::array<int, 3>;

    graph_key key() const;

    bool check(const adaskip_topology & topology);
    void skip_sublayers(const adaskip_topology & topology, ggml_cgraph * gf);
    void add_statistics(const adaskip_topology & topology);
    void rebuild(
            const adaskip_topology & topology, ggml_cgraph * gf, const std::vector<ggml_tensor *> & roots,
            const ggml_tensor * dropped);

    bool is_skipped(const adaskip_term & term) const;
    bool is_skipped(const adaskip_junction & junction) const;

    int           reduce(ggml_tensor * a, ggml_tensor * b, ggml_tensor * node);
    ggml_tensor * resolve(ggml_tensor * t) const;
    void          read_replaced(ggml_tensor * node) const;

    std::array<plan, 2> plans;

    int32_t phase = ADASKIP_PHASE_PREFILL;

    int32_t                     statistics_mode      = ADASKIP_STATISTICS_OFF;
    adaskip_statistics_callback statistics_callback  = nullptr;
    void *                      statistics_user_data = nullptr;

    uint64_t plan_id_next = 1;

    //
    // the last graph that the pass rewrote
    //

    graph_key graph_key_last;
    bool      graph_is_new = false;

    ggml_context_ptr ctx; // the tensors that the pass added

    std::unordered_map<const ggml_tensor *, ggml_tensor *>              replaced; // node -> what its consumers read instead
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>> behind;   // node -> nodes to compute right behind it

    std::vector<ggml_tensor *>                   reductions;   // F32 [1, 1, n_rows] each
    std::vector<std::array<observation, 2>>      observations; // [n_layer][2]
};
