#pragma once

#include "adaskip-plan.h"
#include "adaskip-repack.h"
#include "adaskip-topology.h"
#include "adaskip-window.h"

#include "ggml.h"

#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

// room for the nodes that the pass adds to a graph, for llama_context
uint32_t adaskip_graph_max_nodes(uint32_t n_layer);

// Rewrites one graph of llama.cpp: removes the skipped sublayers, and adds the nodes that observe the others. It lives
// for one graph build. The given ggml_context owns the tensors that it adds.
class adaskip_pass {
public:
    // end, elided: as for adaskip_topology_find; if `end` is null, nothing is skipped or observed
    adaskip_pass(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * end, int n_layer, const adaskip_skip_set & set,
            const std::vector<bool> & elided);

    // throws if this graph cannot be computed under the skip set
    void check() const;

    void skip_sublayers();

    // lets attentions of the skip set look back at a window
    void narrow_attentions(llm_graph_result & res, const adaskip_kv & kv, const llama_hparams & hparams);

    // Without flash attention, llama.cpp makes a transposed copy of V in a cache for flash attention. Lets a ubatch of
    // few tokens multiply by V as it is: on CPUs, answers after 7,600 tokens come 1.3 to 1.5 times as fast.
    void keep_rows_of_v();

    // lets flash attentions of 64 to 255 tokens compute fewer tiles
    void fill_flash_tiles(int n_threads);

    // lets products read the copies of their weights
    void repack_weights(const adaskip_repacked & repacked);

    // lets products with many tokens read weights of these types as F32; types: bits of ggml_type
    void unpack_weights(uint64_t types, uint32_t n_layer);

    // marks a result without a reader as dead; null has no effect
    void drop(const ggml_tensor * root) { dropped.insert(root); }

    // keeps a node alive, even if no root depends on it
    void keep(ggml_tensor * node) { kept.push_back(node); }

    // finds the live nodes, and returns the sizes in bytes of the inputs that none of them reads
    std::vector<size_t> find_live();

    // Lists the live nodes again in llama.cpp's order, and returns their number. n_changes, for add_marker: number of
    // changes of the graph's shape.
    int rebuild(int64_t n_changes);

    //
    // for adaskip_observer
    //

    // computes t directly after a node of the graph, and keeps its memory
    void add_output(ggml_tensor * node, ggml_tensor * t);

    bool is_skipped(const adaskip_term & term) const;

    // the tensor that is read in place of t, t itself if no sublayer was removed there
    ggml_tensor * resolve(ggml_tensor * t) const;

    // input and output of a sublayer that runs while another one of its junction is skipped, else null
    std::pair<ggml_tensor *, ggml_tensor *> input_output(const adaskip_term & term) const;

    ggml_context * const   ctx;
    ggml_cgraph * const    gf;
    const adaskip_topology topology;

private:
    bool is_skipped(const adaskip_junction & junction) const;
    void read_replaced(ggml_tensor * node) const;
    void add_marker(int64_t n_values);

    const adaskip_skip_set &  set;
    const std::vector<bool> & elided;

    const std::vector<ggml_tensor *> nodes; // as llama.cpp built them
    const std::vector<ggml_tensor *> roots;
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>>
            inputs; // inputs that each node read as llama.cpp built it

    std::unordered_set<const ggml_tensor *> dropped;
    std::vector<ggml_tensor *>              kept;
    std::unordered_set<const ggml_tensor *> live;

    std::unordered_map<const ggml_tensor *, ggml_tensor *> replaced; // node -> what its consumers read instead
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>>
            behind; // node -> nodes to compute directly after it

    std::unordered_map<const ggml_tensor *, std::pair<ggml_tensor *, ggml_tensor *>>
            running; // by the branch, for input_output
};
