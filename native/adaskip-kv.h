#pragma once

#include "adaskip.h"

#include "llama.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

struct ggml_tensor;
struct llama_hparams;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cells;
class llama_memory_recurrent;

// Which positions of a context's memory may be read.
//
// Every KV cell keeps the id of the skip set that it was computed under, and every recurrent state the ids of all sets
// that its positions were; llama.cpp carries them along where sequences are copied, shifted, moved and saved. An id is
// made of the contents of its set alone (see adaskip_skip_set), so it means the same in every context and process, and
// 0 is the whole model.

// In the upper 8 bits an id counts how often its cell was moved: what stood before it then is not what stands there
// now.
constexpr int      ADASKIP_MOVES_BIT   = 56;
constexpr int32_t  ADASKIP_MOST_MOVES  = 255;
constexpr uint64_t ADASKIP_MOVED_WHOLE = 1ULL << 31; // the set of a moved cell that the whole model computed

inline uint64_t adaskip_set_of(uint64_t set_id) {
    return set_id & ((1ULL << ADASKIP_MOVES_BIT) - 1);
}
inline int32_t adaskip_moves_of(uint64_t set_id) {
    return (int32_t) (set_id >> ADASKIP_MOVES_BIT);
}

// How many cells of each sequence were computed under each skip set but the whole model: it tells without a look at the
// cells which sets a sequence reads.
class adaskip_cell_counts {
public:
    void add(llama_seq_id seq_id, uint64_t set_id);
    void remove(llama_seq_id seq_id, uint64_t set_id);
    void clear() { counts.clear(); }

    bool all_of(llama_seq_id seq_id, const std::function<bool(uint64_t)> & f) const;

private:
    std::map<std::pair<llama_seq_id, uint64_t>, uint32_t> counts;
};

// What llama.cpp keeps beside the position of a cell, and saves, with the skip set that the cell was computed under.
template <typename T> struct adaskip_cell_ext : T {
    uint64_t set_id = 0;

    using T::operator=; // leaves set_id as it is

    void reset() { *this = adaskip_cell_ext{}; }
};

// The memory of one context: every KV cache and every recurrent memory in it, of whatever kind the whole is.
struct adaskip_kv {
    uint64_t set_id = 0; // of what is computed next

    std::vector<bool> elided; // [n_layer] or empty: attentions without KV, see adaskip_kv_alias

    bool moves = false; // whether moved cells may be read

    std::vector<llama_kv_cache *>               caches;
    std::vector<const llama_memory_recurrent *> states;

    // the cache that holds this tensor of K, null if there is none
    const llama_kv_cache * cache_of(const ggml_tensor * k) const;

    // the cells of a cache that hold the sequence
    static const llama_kv_cells & cells_of(const llama_kv_cache * cache, llama_seq_id seq_id);

    // Whether no cell that a sliding window has left is written over, as llama.cpp does otherwise: where cells may be
    // moved, and the cache with windows is as large as the other.
    bool keeps_windows() const;

    // Takes runs of positions out of a sequence, to stand at other positions in it when they are taken back, and
    // removes its other cells from n_kept on. Throws, and changes nothing, where the memory lacks a position of a run.
    void set_aside(llama_seq_id seq_id, llama_pos n_kept, const std::vector<adaskip_run> & runs) const;

    // takes back what now stands before `end`, in every cache
    void take_back(llama_seq_id seq_id, llama_pos end) const;

    // the first position of the sequence whose set does not satisfy f, INT32_MAX where there is none; 0 if it went into
    // a recurrent state, which cannot be rewound
    llama_pos first_unreadable(llama_seq_id seq_id, const std::function<bool(uint64_t)> & is_readable) const;
};

using adaskip_kv_ptr = std::shared_ptr<adaskip_kv>;

// the record of a context that this thread begins to create, and how its memory takes part in it
adaskip_kv_ptr adaskip_kv_create();
adaskip_kv_ptr adaskip_kv_join(llama_kv_cache * cache);
adaskip_kv_ptr adaskip_kv_join(const llama_memory_recurrent * state);

// for contexts that this thread creates: [n_layer], true where an attention shall get no KV
void adaskip_elide_kv_next(std::vector<bool> elided);

// The layer whose KV stands in for that of layer il in a cache of the layers that pass the filter, -1 if il has its
// own. The graph is built as if il had KV, and the pass then takes its attention out. A layer whose KV others reuse
// keeps it.
int32_t adaskip_kv_alias(const llama_hparams & hparams, const std::function<bool(int32_t)> & filter,
        const std::function<int32_t(int32_t)> & reuse, int32_t il);

// Saved states: a cell's number of sequences, with the number of its ids in the upper half, then these ids. What no
// plan touched is saved as llama.cpp does, which refuses all else.
void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, uint64_t set_id);
void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, const std::set<uint64_t> & set_ids);

// the ids behind n_seq_id, which was just read and becomes the number of sequences alone
std::set<uint64_t> adaskip_read_set_ids(llama_io_read_i & io, uint32_t & n_seq_id);
uint64_t           adaskip_read_set_id(llama_io_read_i & io, uint32_t & n_seq_id);
