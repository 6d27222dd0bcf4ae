#pragma once

#include "llama.h"

#include <cstdint>
#include <map>
#include <vector>

// Which attention sublayers did not run, for every position of every sequence.
//
// An attention that was skipped for a position wrote no KV there, so a plan may use that position only if it skips that
// attention too. Positions that were never recorded count as complete: before any plan is set, everything ran.
class adaskip_kv {
public:
    using layer_mask = std::vector<bool>; // [n_layer], true where the attention was skipped

    struct run {
        llama_pos  start;
        layer_mask skipped;
    };

    void record(llama_seq_id seq_id, llama_pos pos, const layer_mask & skipped);

    // first position in [0, end) that lacks an attention which a plan with this mask runs, or `end`
    llama_pos first_stale(llama_seq_id seq_id, const layer_mask & skipped, llama_pos end) const;

    std::vector<run> get_runs(llama_seq_id seq_id) const;
    void             set_runs(llama_seq_id seq_id, const std::vector<run> & runs);

private:
    uint32_t intern(const layer_mask & skipped);

    // mask 0 is "nothing skipped"; the empty mask means the same
    std::vector<layer_mask> masks = { {} };

    // start of run -> mask; every sequence begins with an implicit run of mask 0
    std::map<llama_seq_id, std::map<llama_pos, uint32_t>> runs_by_seq;
};
