#pragma once

#include "adaskip.h"
#include "adaskip-vectors.h"

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

struct llama_model;

// An adaskip_set with its vectors uploaded.
struct adaskip_skip_set {
    std::vector<uint8_t> skip;             // [n_layer][2], empty: run everything
    std::vector<float>   scale;            // [n_layer][2]
    std::vector<bool>    attention;        // [n_layer], attentions that are skipped
    bool                 keeps_kv = false; // whether these compute and store their K and V all the same
    std::vector<bool>    windowed;         // [n_layer] or empty, attentions that run and look back at a window
    int32_t              window  = 0;      // its tokens
    int32_t              n_sinks = 0;      // positions at the beginning of the sequence that these read besides

    adaskip_vectors_ptr bias; // null for none
    adaskip_vectors_ptr down; // likewise, [n_embd, n_rank] each
    adaskip_vectors_ptr up;   // [n_rank, n_embd] each

    // What the positions computed under it are known by: a hash of what is skipped and what stands in for it, 0 where
    // the whole model runs. In all others bit 31 is set, and the upper 8 bits are not, see adaskip_moved.
    uint64_t set_id = 0;

    uint64_t graph_id = 0; // what a graph was built under; 0 for the empty set

    bool empty() const { return skip.empty(); }
    bool is_windowed(int il) const { return !windowed.empty() && windowed[il]; }
    bool skips(int il, int kind) const { return !skip.empty() && skip[2 * il + kind]; }
};

uint64_t adaskip_new_graph_id();

// the id of whatever an online stage makes of a set
uint64_t adaskip_online_set_id(uint64_t set_id, const adaskip_online_params & params);

// An adaskip_plan as a context keeps it.
struct adaskip_plan_sets {
    // holds from the start-th decoded token of a request on
    struct step {
        int32_t          start;
        adaskip_skip_set set;
    };

    uint64_t                             tag = 0;
    adaskip_skip_set                     bulk;
    adaskip_skip_set                     prefill;
    std::vector<step>                    decode = { { 0, {} } }; // never empty
    std::optional<adaskip_online_params> online;

    // by id, which attentions each of these sets leaves without KV, and those that the online stage makes of them; the
    // readable sets of other plans leave none
    std::map<uint64_t, std::vector<bool>> holes;

    // Whether a position that was computed under some set, however often it was moved, may be read where these
    // attentions are skipped: the set is the whole model, of this plan or readable by it, and has K and V of every
    // attention that runs now.
    bool is_readable(uint64_t set_id, const std::vector<bool> & skipped) const;
};

// What this model needs to run a plan: checks it, and uploads what is not among the sets of the plan in force; plan may
// be null. Throws, and changes nothing.
//   sublayers: [n_layer][2], not read where plan is null; elided: [n_layer] or empty
adaskip_plan_sets adaskip_plan_init(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan * plan, const adaskip_plan_sets & in_force);

// The id that the bulk set of a plan gets, 0 where it leaves the whole model. Throws where the set cannot be run.
uint64_t adaskip_plan_bulk_id(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan & plan);
