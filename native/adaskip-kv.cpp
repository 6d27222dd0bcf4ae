#include "adaskip-kv.h"

#include <algorithm>

static bool mask_is_empty(const adaskip_kv::layer_mask & mask) {
    return std::find(mask.begin(), mask.end(), true) == mask.end();
}

// positions computed with `have` can serve a plan with `need` if nothing was skipped that the plan runs
static bool mask_is_subset(const adaskip_kv::layer_mask & have, const adaskip_kv::layer_mask & need) {
    for (size_t il = 0; il < have.size(); ++il) {
        if (have[il] && !(il < need.size() && need[il])) {
            return false;
        }
    }
    return true;
}

uint32_t adaskip_kv::intern(const layer_mask & skipped) {
    if (mask_is_empty(skipped)) {
        return 0;
    }
    const auto it = std::find(masks.begin(), masks.end(), skipped);
    if (it != masks.end()) {
        return (uint32_t) (it - masks.begin());
    }
    masks.push_back(skipped);
    return (uint32_t) (masks.size() - 1);
}

void adaskip_kv::record(llama_seq_id seq_id, llama_pos pos, const layer_mask & skipped) {
    const uint32_t id = intern(skipped);

    auto & runs = runs_by_seq[seq_id];

    auto           next   = runs.upper_bound(pos);
    const uint32_t id_old = next == runs.begin() ? 0 : std::prev(next)->second;
    if (id_old == id) {
        return;
    }

    // split the run that holds pos, unless pos is its last position
    if (next == runs.end() || next->first != pos + 1) {
        next = runs.emplace(pos + 1, id_old).first;
    }
    if (next->second == id) {
        runs.erase(next);
    }

    auto           cur     = runs.insert_or_assign(pos, id).first;
    const uint32_t id_prev = cur == runs.begin() ? 0 : std::prev(cur)->second;
    if (id_prev == id) {
        runs.erase(cur);
    }
}

llama_pos adaskip_kv::first_stale(llama_seq_id seq_id, const layer_mask & skipped, llama_pos end) const {
    const auto it = runs_by_seq.find(seq_id);
    if (it == runs_by_seq.end()) {
        return end;
    }
    for (const auto & [start, id] : it->second) {
        if (start >= end) {
            break;
        }
        if (!mask_is_subset(masks[id], skipped)) {
            return start;
        }
    }
    return end;
}

std::vector<adaskip_kv::run> adaskip_kv::get_runs(llama_seq_id seq_id) const {
    std::vector<run> res;
    const auto       it = runs_by_seq.find(seq_id);
    if (it != runs_by_seq.end()) {
        for (const auto & [start, id] : it->second) {
            res.push_back({ start, masks[id] });
        }
    }
    return res;
}

void adaskip_kv::set_runs(llama_seq_id seq_id, const std::vector<run> & runs) {
    auto & dst = runs_by_seq[seq_id];
    dst.clear();
    for (const auto & r : runs) {
        dst[r.start] = intern(r.skipped);
    }
}
