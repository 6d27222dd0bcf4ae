#include "adaskip-kv.h"

#include "adaskip-error.h"
#include "adaskip-llama.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <limits>

//
// adaskip_cell_counts
//

void adaskip_cell_counts::add(llama_seq_id seq_id, uint64_t set_id) {
    if (set_id != 0) {
        ++counts[{ seq_id, set_id }];
    }
}

void adaskip_cell_counts::remove(llama_seq_id seq_id, uint64_t set_id) {
    const auto it = counts.find({ seq_id, set_id });
    if (it != counts.end() && --it->second == 0) {
        counts.erase(it);
    }
}

bool adaskip_cell_counts::all_of(llama_seq_id seq_id, const std::function<bool(uint64_t)> & f) const {
    for (auto it = counts.lower_bound({ seq_id, 0 }); it != counts.end() && it->first.first == seq_id; ++it) {
        if (!f(it->first.second)) {
            return false;
        }
    }
    return true;
}

//
// adaskip_kv
//

const llama_kv_cache * adaskip_kv::cache_of(const ggml_tensor * k) const {
    for (const auto * cache : caches) {
        for (const auto & layer : cache->layers) {
            if (layer.k == k) {
                return cache;
            }
        }
    }
    return nullptr;
}

bool adaskip_kv::has_quantized_v() const {
    return std::any_of(caches.begin(), caches.end(), [](const llama_kv_cache * cache) {
        return std::any_of(cache->layers.begin(), cache->layers.end(),
                [](const auto & layer) { return layer.v && ggml_is_quantized(layer.v->type); });
    });
}

const llama_kv_cells & adaskip_kv::cells_of(const llama_kv_cache * cache, llama_seq_id seq_id) {
    return cache->v_cells[cache->seq_to_stream.at(seq_id)];
}

llama_pos adaskip_kv::first_unreadable(llama_seq_id seq_id, const std::function<bool(uint64_t)> & is_readable) const {
    llama_pos res = std::numeric_limits<llama_pos>::max();

    for (const auto * cache : caches) {
        const auto & cells = cells_of(cache, seq_id);
        if (cells.set_counts().all_of(seq_id, is_readable)) {
            continue;
        }
        for (const auto & [pos, i] : adaskip_seq_pos(cells, seq_id)) {
            if (!is_readable(cells.set_id_get(i))) {
                res = std::min(res, pos);
                break;
            }
        }
    }
    for (const auto * state : states) {
        const int32_t tail = seq_id < (llama_seq_id) state->size ? state->cells[seq_id].tail : -1;
        if (tail >= 0) {
            const auto & set_ids = state->cells[tail].set_ids;
            res                  = std::all_of(set_ids.begin(), set_ids.end(), is_readable) ? res : 0;
        }
    }
    return res;
}

bool adaskip_kv::keeps_windows() const {
    return moves && std::all_of(caches.begin(), caches.end(), [&](const llama_kv_cache * cache) {
        return cache->get_size() == caches.front()->get_size();
    });
}

// Cells that are set aside belong to two sequences that no batch names. With one sequence alone, llama.cpp would
// overwrite a cell after a sliding window has left it.
static constexpr llama_seq_id SEQS_ASIDE[] = { LLAMA_MAX_SEQ - 2, LLAMA_MAX_SEQ - 1 };

// the index of the run that has the position, runs.size() for none
static size_t run_of(const std::vector<adaskip_run> & runs, llama_pos pos) {
    return std::find_if(runs.begin(), runs.end(), [&](const adaskip_run & run) {
        return run.from <= pos && pos < run.from + run.n;
    }) - runs.begin();
}

void adaskip_kv::set_aside(llama_seq_id seq_id, llama_pos n_kept, const std::vector<adaskip_run> & runs) const {
    for (const auto * cache : caches) {
        const auto &         cells = cells_of(cache, seq_id);
        std::vector<int32_t> n_found(runs.size());
        for (const auto & [pos, i] : adaskip_seq_pos(cells, seq_id)) {
            const size_t run = run_of(runs, pos);
            if (run < runs.size()) {
                const int32_t moves = adaskip_moves_of(cells.set_id_get(i)) + runs[run].n_moves;
                n_found[run] += cells.seq_count(i) == 1 && moves <= ADASKIP_MOST_MOVES;
            }
        }
        const auto is_taken = [&](const adaskip_run & run) {
            const auto & aside = adaskip_seq_pos(cells, SEQS_ASIDE[0]);
            const auto   it    = aside.lower_bound({ run.to, 0 });
            return it != aside.end() && it->first < run.to + run.n;
        };
        if (std::any_of(runs.begin(), runs.end(), is_taken)) {
            throw adaskip_exception(ADASKIP_ERROR_ARGUMENT, "a run that was set aside before already has this place");
        }
        for (size_t run = 0; run < runs.size(); ++run) {
            if (n_found[run] != runs[run].n) {
                throw adaskip_exception(
                        ADASKIP_ERROR_ARGUMENT, format("the memory has %d of the %d positions from %d on", n_found[run],
                                                        runs[run].n, runs[run].from));
            }
        }
    }
    for (auto * cache : caches) {
        const uint32_t stream = cache->seq_to_stream.at(seq_id);
        auto &         cells  = cache->v_cells[stream];
        const auto     held   = adaskip_seq_pos(cells, seq_id); // a copy, because the cells change
        for (auto it = held.lower_bound({ n_kept, 0 }); it != held.end(); ++it) {
            const auto & [pos, i] = *it;
            const size_t run      = run_of(runs, pos);
            if (run == runs.size()) {
                cells.seq_rm(i, seq_id);
                cache->v_heads[stream] = std::min(cache->v_heads[stream], i);
                continue;
            }
            if (const uint64_t moves = (uint64_t) runs[run].n_moves << ADASKIP_MOVES_BIT; moves != 0) {
                const uint64_t set_id = cells.set_id_get(i);
                cells.set_id_set(i, (set_id == 0 ? ADASKIP_MOVED_WHOLE : set_id) + moves);
            }
            if (const llama_pos shift = runs[run].to - runs[run].from; shift != 0) {
                cells.pos_add(i, shift);
            }
            for (const llama_seq_id aside : SEQS_ASIDE) {
                cells.seq_add(i, aside);
            }
            cells.seq_rm(i, seq_id);
        }
    }
}

void adaskip_kv::take_back(llama_seq_id seq_id, llama_pos end) const {
    for (auto * cache : caches) {
        auto &     cells = cache->v_cells[cache->seq_to_stream.at(seq_id)];
        const auto held  = adaskip_seq_pos(cells, SEQS_ASIDE[0]); // a copy, because the cells change
        for (auto it = held.begin(); it != held.end() && it->first < end; ++it) {
            cells.seq_add(it->second, seq_id);
            for (const llama_seq_id aside : SEQS_ASIDE) {
                cells.seq_rm(it->second, aside);
            }
        }
    }
}

static thread_local std::weak_ptr<adaskip_kv> kv_of_next_memory;

adaskip_kv_ptr adaskip_kv_create() {
    auto res          = std::make_shared<adaskip_kv>();
    kv_of_next_memory = res;
    return res;
}

static adaskip_kv_ptr kv_of_this_memory() {
    auto res = kv_of_next_memory.lock();
    return res ? res : std::make_shared<adaskip_kv>();
}

adaskip_kv_ptr adaskip_kv_join(llama_kv_cache * cache) {
    auto res = kv_of_this_memory();
    res->caches.push_back(cache);
    return res;
}

adaskip_kv_ptr adaskip_kv_join(const llama_memory_recurrent * state) {
    auto res = kv_of_this_memory();
    res->states.push_back(state);
    return res;
}

//
// elision
//

// the mask of adaskip_elide_kv, for contexts that this thread creates
static thread_local std::vector<bool> elided_next;

void adaskip_elide_kv_next(std::vector<bool> elided) {
    elided_next = std::move(elided);
}

int32_t adaskip_kv_alias(const llama_hparams & hparams, const std::function<bool(int32_t)> & filter,
        const std::function<int32_t(int32_t)> & reuse, int32_t il) {
    const auto n_layer   = (int32_t) hparams.n_layer_all;
    const auto is_elided = [&](int32_t i) {
        if (i >= (int32_t) elided_next.size() || !elided_next[i]) {
            return false;
        }
        for (int32_t reader = 0; reuse && reader < n_layer; ++reader) {
            if (reuse(reader) == i) {
                return false;
            }
        }
        return true;
    };
    if (!is_elided(il)) {
        return -1;
    }
    auto & elided = kv_of_this_memory()->elided;
    elided.resize(n_layer);
    elided[il] = true;

    int32_t il_first = il; // if no layer of this shape has KV, the first one keeps it
    for (int32_t i = 0; i < n_layer; ++i) {
        if (!hparams.has_kv(i) || (filter && !filter(i)) || hparams.n_embd_k_gqa(i) != hparams.n_embd_k_gqa(il) ||
                hparams.n_embd_v_gqa(i) != hparams.n_embd_v_gqa(il)) {
            continue;
        }
        if (!is_elided(i)) {
            return i;
        }
        il_first = std::min(il_first, i);
    }
    return il_first == il ? -1 : il_first;
}

//
// saved states
//

void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, uint64_t set_id) {
    adaskip_write_n_seq_id(io, n_seq_id, set_id == 0 ? std::set<uint64_t>{} : std::set<uint64_t>{ set_id });
}

void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, const std::set<uint64_t> & set_ids) {
    n_seq_id |= (uint32_t) set_ids.size() << 16;
    io.write(&n_seq_id, sizeof(n_seq_id));
    for (const uint64_t set_id : set_ids) {
        io.write(&set_id, sizeof(set_id));
    }
}

std::set<uint64_t> adaskip_read_set_ids(llama_io_read_i & io, uint32_t & n_seq_id) {
    std::set<uint64_t> res;
    for (uint32_t n = n_seq_id >> 16; n > 0; --n) {
        uint64_t set_id;
        io.read(&set_id, sizeof(set_id));
        res.insert(set_id);
    }
    n_seq_id &= 0xffff;
    return res;
}

uint64_t adaskip_read_set_id(llama_io_read_i & io, uint32_t & n_seq_id) {
    const auto set_ids = adaskip_read_set_ids(io, n_seq_id);
    return set_ids.empty() ? 0 : *set_ids.begin();
}
