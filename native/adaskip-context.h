#pragma once

#include "adaskip.h"
#include "adaskip-kv.h"

#include "ggml-cpp.h"
#include "llama-graph.h"

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

struct llama_context;
struct llama_model;
struct adaskip_junction;
struct adaskip_term;
struct adaskip_topology;

// beside enum adaskip_statistics_flags: only the FFNs, for the online stage
static constexpr int32_t ADASKIP_STATISTICS_ONLINE = 1 << 16;

// for contexts that this thread creates: [n_layer], true where an attention gets no KV
void adaskip_elide_kv_next(std::vector<bool> elided);

// the layer whose KV stands in for that of layer il in a cache of the layers that pass the filter, -1 if il has its
// own. The graph is built as if il had KV, and the pass then takes its attention out.
int32_t adaskip_kv_alias(const llama_hparams & hparams, const std::function<bool(int32_t)> & filter, int32_t il);

// ubatches of at most so many tokens have their statistics reduced by the host
static constexpr int64_t ADASKIP_MAX_TOKENS_ON_HOST = 8;

// room for the nodes that the pass adds to a graph, see llama_context::graph_max_nodes
uint32_t adaskip_graph_max_nodes(uint32_t n_layer);

// One array per skipped sublayer of a plan, each in a buffer on its layer's own device.
struct adaskip_vectors {
    std::vector<ggml_tensor *>           tensors; // [n_layer][2], null where there is none
    std::vector<float>                   data;    // [ne1][ne0] of each tensor there is
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};

using adaskip_vectors_ptr = std::shared_ptr<adaskip_vectors>;

// uploads data[n_layer][2][ne1][ne0] where skip is 1, maps in BF16 where that is faster and the model's own weights are
// no F32 either; throws if a device has no room
adaskip_vectors_ptr adaskip_vectors_init(const llama_model & model, const std::vector<uint8_t> & skip,
        const float * data, int64_t ne0, int64_t ne1, bool is_map);

// The part of a llama_context that skips sublayers and collects statistics. Its hooks are called around the computation
// of each ubatch; with no plan and no statistics they leave the graph as llama.cpp built it.
class adaskip_context {
public:
    struct plan {
        std::vector<uint8_t>   skip;      // [n_layer][2], empty: run everything
        std::vector<float>     scale;     // [n_layer][2]
        adaskip_kv::layer_mask attention; // [n_layer], attentions that are skipped

        adaskip_vectors_ptr bias; // null for none
        adaskip_vectors_ptr down; // likewise, [n_embd, n_rank] each
        adaskip_vectors_ptr up;   // [n_rank, n_embd] each

        uint64_t id = 0; // what a graph was built under; 0 for the empty plan

        bool empty() const { return skip.empty(); }
        bool skips(int il, int kind) const { return !skip.empty() && skip[2 * il + kind]; }
    };

    // holds from the start-th decoded token of a request on
    struct step {
        int32_t start;
        plan    value;
    };

    // the online stage of one request
    struct online_stage {
        bool    done     = false;
        int32_t n_tokens = 0;

        std::vector<double>             sum_similarity; // [n_layer], over the observed tokens
        std::vector<double>             sum_u_sq;
        std::vector<double>             sum_v_sq;
        std::vector<std::vector<float>> ratios; // [n_layer][n_tokens], empty where not observed

        plan value; // the plan with the added FFNs, once done

        bool   observed(int il) const { return il < (int) ratios.size() && !ratios[il].empty(); }
        double similarity(int il) const;
        double scale(int il, int32_t mode) const;
    };

    adaskip_context();

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
    ggml_cgraph * graph_pass(
            const llama_context & lctx, ggml_cgraph * gf, llm_graph_result & res, llm_graph_type gtype);

    // hands out the statistics of the ubatch that was just computed
    void end(const llama_context & lctx, const llama_ubatch & ubatch);

    //
    // settings
    //

    void set_plan(int32_t phase, plan value);
    void set_decode_schedule(std::vector<step> steps);
    void set_online(const adaskip_online_params * params);
    void set_phase(int32_t value);
    void begin_request();
    void set_statistics(int32_t flags, adaskip_statistics_callback callback, void * user_data);

    // the plan under which the next token of this phase runs
    const plan & get_plan(int32_t phase) const;

    // the decode plan of this request, without what the online stage added
    const plan & get_plan_of_request() const;

    const online_stage & get_online() const { return online; }
    int32_t              online_scale() const { return online_params.scale; }

    // attentions without KV in this context, [n_layer] or empty
    const std::vector<bool> kv_elided;

    adaskip_counters counters = {};
    adaskip_kv       kv;

    std::vector<adaskip_sublayer> sublayers; // [n_layer][2], empty until somebody asks

    std::string error; // why the last hook failed

private:
    // the settings that a graph depends on
    struct graph_key {
        uint64_t plan_id    = 0;
        int32_t  statistics = 0;

        bool operator==(const graph_key & other) const {
            return plan_id == other.plan_id && statistics == other.statistics;
        }
    };

    // u·v of every row, reduced on the device or, from the values of both, on the host; indices of `reductions`, -1 for
    // none
    struct dot_product {
        int reduced = -1;
        int u       = -1;
        int v       = -1;
    };

    // where the figures of one sublayer are in `reductions`, -1 if it is not observed
    struct observation {
        dot_product dot;
        dot_product u_sq;
        dot_product v_sq;

        int sum_u = -1; // the sum over tokens, or the values of few
        int sum_v = -1;
        int u     = -1;
        int v     = -1;
    };

    // statistics of one ubatch, laid out as in adaskip_statistics
    struct statistics_values {
        std::vector<float> values;
        std::vector<float> layer_dot;
        std::vector<float> sums;

        std::vector<const float *> activations;
    };

    graph_key    key() const;
    const plan & active_plan() const { return get_plan(phase); }
    bool         observes_online() const;
    void         accumulate(const std::vector<float> & values, int64_t n_tokens);
    void         finish_online();

    void set_steps(int32_t phase, std::vector<step> steps);

    std::vector<const float *> read_reductions(const llama_context & lctx);

    statistics_values read_statistics(const llama_context & lctx, const llama_ubatch & ubatch);

    bool check(const adaskip_topology & topology);
    void skip_sublayers(const adaskip_topology & topology, ggml_cgraph * gf);
    void add_statistics(const adaskip_topology & topology, ggml_cgraph * gf);
    void find_overwritten(ggml_cgraph * gf);
    void rebuild(const adaskip_topology & topology, ggml_cgraph * gf, const std::vector<ggml_tensor *> & roots,
            const ggml_tensor * dropped);

    bool is_skipped(const adaskip_term & term) const;
    bool is_skipped(const adaskip_junction & junction) const;

    int           reduce(ggml_tensor * a, ggml_tensor * b, ggml_tensor * node);
    int           sum_over_tokens(ggml_tensor * t, ggml_tensor * node);
    int           values_of(ggml_tensor * t, ggml_tensor * node);
    int           add_reduction(ggml_tensor * t, ggml_tensor * node);
    void          add_marker(ggml_cgraph * gf, int64_t n_values);
    ggml_tensor * resolve(ggml_tensor * t) const;
    void          read_replaced(ggml_tensor * node) const;

    std::array<std::vector<step>, 2> plans; // by phase, never empty; prefill has one step

    int32_t phase     = ADASKIP_PHASE_PREFILL;
    int32_t n_decoded = 0; // tokens decoded in this request

    bool                  online_enabled = false;
    adaskip_online_params online_params  = {};
    online_stage          online;

    int32_t                     statistics_flags     = 0;
    adaskip_statistics_callback statistics_callback  = nullptr;
    void *                      statistics_user_data = nullptr;

    uint64_t plan_id_next = 1;

    //
    // the last graph that the pass rewrote
    //

    graph_key graph_key_last;
    int64_t   n_key_changes = 0; // graphs before and after a change have different shapes
    bool      graph_is_new  = false;

    bool reduced_on_device = true; // the statistics of the last graph that had any

    ggml_context_ptr ctx; // the tensors that the pass added

    std::unordered_map<const ggml_tensor *, ggml_tensor *> replaced; // node -> what its consumers read instead
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>>
            behind; // node -> nodes to compute right behind it

    std::vector<ggml_tensor *>      reductions;    // F32, n_rows or n_embd values each, or all values of a stream
    std::vector<std::vector<float>> device_copies; // of the reductions that are not in the host's memory

    std::unordered_set<const ggml_tensor *> overwritten; // tensors that a later node writes to in place

    // input and output of the sublayers that run where others of their junction are skipped
    std::unordered_map<const ggml_tensor *, std::pair<ggml_tensor *, ggml_tensor *>> running; // by the branch

    std::vector<std::array<observation, 2>> observations; // [n_layer][2]
    std::vector<dot_product>                layer_dots;   // [n_layer]
};
