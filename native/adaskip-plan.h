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
    bool                 keeps_kv = false; // whether these still compute and store their K and V
    std::vector<bool>    windowed;         // [n_layer] or empty, attentions that run and look back at a window
    int32_t              window  = 0;      // its tokens
    int32_t              n_sinks = 0;      // positions at the beginning of the sequence that these also read
    bool                 refits  = false;  // whether `up` may be replaced

    adaskip_vectors_ptr bias; // null for none
    adaskip_vectors_ptr down; // likewise, [n_embd, n_rank] each
    adaskip_vectors_ptr up;   // [n_rank, n_embd] each

    // Id for the positions computed under this set: a hash of the skipped sublayers and their compensation, 0 for the
    // whole model. In all others bit 31 is set, and the upper 8 bits are 0 for adaskip_moves_of.
    uint64_t set_id = 0;

    uint64_t graph_id = 0; // id for graphs built under this set; 0 for the empty set

    bool empty() const { return skip.empty(); }
    bool is_windowed(int il) const { return !windowed.empty() && windowed[il]; }
    bool skips(int il, int kind) const { return !skip.empty() && skip[2 * il + kind]; }
};

uint64_t adaskip_new_graph_id();

// the common id of all sets that an online stage can make of a set
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
    adaskip_skip_set                     narrow; // the bulk's windows alone, with its id; empty if prefill skips
    adaskip_skip_set                     prefill;
    std::vector<step>                    decode = { { 0, {} } }; // never empty
    std::optional<adaskip_online_params> online;

    // Attentions without KV, by the id of a set: the plan's sets, those that the online stage makes of them, and the
    // readable sets of other plans, which have none.
    std::map<uint64_t, std::vector<bool>> holes;

    // Whether positions of a set may be read while these attentions are skipped: it is the whole model, of this plan or
    // readable by it, and has K and V of every attention that runs now. Moves are ignored.
    bool is_readable(uint64_t set_id, const std::vector<bool> & skipped) const;
};

// Checks a plan, which may be null, and uploads the sets that the plan in force does not have. Throws, and changes
// nothing, if the plan cannot run.
//   sublayers: [n_layer][2], not read if plan is null; elided: [n_layer] or empty
adaskip_plan_sets adaskip_plan_init(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan * plan, const adaskip_plan_sets & in_force);

// the ids of these plans' bulk sets, 0 for one that skips and windows nothing; throws if a set cannot run
void adaskip_plan_bulk_ids(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan * plans, int32_t n, uint64_t * ids);
