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

// Records which positions of a context's memory may be read.
//
// Every KV cell has the id of the skip set that it was computed under, and every recurrent state the ids of all its
// positions. llama.cpp takes them along when sequences are copied, shifted, moved and saved. An id is a hash of its set
// (see adaskip_skip_set), equal in every context and process. 0 is the whole model.

// The upper 8 bits of an id count the moves of its cell: its K and V were computed after other text.
constexpr int      ADASKIP_MOVES_BIT   = 56;
constexpr int32_t  ADASKIP_MOST_MOVES  = 255;
constexpr uint64_t ADASKIP_MOVED_WHOLE = 1ULL << 31; // the set of a moved cell that the whole model computed

inline uint64_t adaskip_set_of(uint64_t set_id) {
    return set_id & ((1ULL << ADASKIP_MOVES_BIT) - 1);
}
inline int32_t adaskip_moves_of(uint64_t set_id) {
    return (int32_t) (set_id >> ADASKIP_MOVES_BIT);
}

// Counts the cells of each sequence by their skip set, without the whole model's. So the sets of a sequence are known
// without a search of its cells.
class adaskip_cell_counts {
public:
    void add(llama_seq_id seq_id, uint64_t set_id);
    void remove(llama_seq_id seq_id, uint64_t set_id);
    void clear() { counts.clear(); }

    bool all_of(llama_seq_id seq_id, const std::function<bool(uint64_t)> & f) const;

private:
    std::map<std::pair<llama_seq_id, uint64_t>, uint32_t> counts;
};

// llama.cpp's extra data of a cell, which it also saves, and the cell's skip set.
template <typename T> struct adaskip_cell_ext : T {
    uint64_t set_id = 0;

    using T::operator=; // leaves set_id as it is

    void reset() { *this = adaskip_cell_ext{}; }
};

// The memory of one context: all its KV caches and recurrent memories, which it does not own.
struct adaskip_kv {
    uint64_t set_id = 0; // of the cells that are computed next

    std::vector<bool> elided; // [n_layer] or empty: attentions without KV, by adaskip_kv_alias

    bool moves = false; // whether moved cells may be read

    std::vector<llama_kv_cache *>               caches;
    std::vector<const llama_memory_recurrent *> states;

    // the cache that holds this tensor of K, null if there is none
    const llama_kv_cache * cache_of(const ggml_tensor * k) const;

    // the cells of a cache that hold the sequence
    static const llama_kv_cells & cells_of(const llama_kv_cache * cache, llama_seq_id seq_id);

    // whether V of a layer is quantized; some caches have no V
    bool has_quantized_v() const;

    // Whether cells that a sliding window has left are kept, where llama.cpp would overwrite them. True if cells may be
    // moved, and the cache with windows is as large as the other one.
    bool keeps_windows() const;

    // adaskip_set_aside and adaskip_take_back (see adaskip.h) for every cache. Throws and changes nothing if a position
    // of a run is missing.
    void set_aside(llama_seq_id seq_id, llama_pos n_kept, const std::vector<adaskip_run> & runs) const;
    void take_back(llama_seq_id seq_id, llama_pos end) const;

    // The first position of the sequence whose set is not readable, INT32_MAX if there is none. It is 0 if the set went
    // into a recurrent state, which cannot be rewound.
    llama_pos first_unreadable(llama_seq_id seq_id, const std::function<bool(uint64_t)> & is_readable) const;
};

using adaskip_kv_ptr = std::shared_ptr<adaskip_kv>;

// creates the record of a context; the caches and states that this thread then creates for it join the record
adaskip_kv_ptr adaskip_kv_create();
adaskip_kv_ptr adaskip_kv_join(llama_kv_cache * cache);
adaskip_kv_ptr adaskip_kv_join(const llama_memory_recurrent * state);

// sets the attentions without KV, [n_layer], for contexts that this thread creates
void adaskip_elide_kv_next(std::vector<bool> elided);

// The layer whose KV layer il uses in a cache of the layers that pass the filter, -1 if il has its own. So llama.cpp
// builds the graph as usual, and the pass then removes the attention. A layer keeps its KV if others reuse it.
int32_t adaskip_kv_alias(const llama_hparams & hparams, const std::function<bool(int32_t)> & filter,
        const std::function<int32_t(int32_t)> & reuse, int32_t il);

// Saved states: writes a cell's number of sequences with the number of its ids in the upper half, then these ids. A
// cell of the whole model is saved as by stock llama.cpp, which refuses states with ids.
void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, uint64_t set_id);
void adaskip_write_n_seq_id(llama_io_write_i & io, uint32_t n_seq_id, const std::set<uint64_t> & set_ids);

// reads the ids after n_seq_id, and removes their number from it
std::set<uint64_t> adaskip_read_set_ids(llama_io_read_i & io, uint32_t & n_seq_id);
uint64_t           adaskip_read_set_id(llama_io_read_i & io, uint32_t & n_seq_id);
