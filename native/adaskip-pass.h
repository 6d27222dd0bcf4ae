#pragma once

#include "adaskip-plan.h"
#include "adaskip-topology.h"
#include "adaskip-window.h"

#include "ggml.h"

#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

// The rewriting of one graph that llama.cpp has built: the skipped sublayers go out, and what observes the others comes
// in. It lives for one graph build; the tensors that it adds are those of the ggml_context that it is given.
class adaskip_pass {
public:
    // end, elided: as for adaskip_topology_find; with a null `end` nothing is skipped or observed
    adaskip_pass(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * end, int n_layer, const adaskip_skip_set & set,
            const std::vector<bool> & elided);

    // throws if this graph cannot be computed under the skip set
    void check() const;

    void skip_sublayers();

    // lets attentions of the skip set look back at a window
    void narrow_attentions(llm_graph_result & res, const adaskip_kv & kv);

    // a result that nobody reads, null for none
    void drop(const ggml_tensor * root) { dropped.insert(root); }

    // a node that somebody reads, although no root may depend on it
    void keep(ggml_tensor * node) { kept.push_back(node); }

    // Finds the live nodes, and returns the sizes of the inputs that none of them reads, in bytes.
    std::vector<size_t> find_live();

    // Lists the live nodes again, in the order in which llama.cpp had them, and returns their number. What is in front
    // goes by the number of changes of shape so far, see add_marker.
    int rebuild(int64_t n_changes);

    //
    // for what is observed
    //

    // computes t right behind a node of the graph, and keeps its memory
    void add_output(ggml_tensor * node, ggml_tensor * t);

    bool is_skipped(const adaskip_term & term) const;

    // what is read in place of a tensor whose sublayer is skipped
    ggml_tensor * resolve(ggml_tensor * t) const;

    // input and output of a sublayer that runs where others of its junction are skipped, null elsewhere
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
            inputs; // that each of them read as llama.cpp built it

    std::unordered_set<const ggml_tensor *> dropped;
    std::vector<ggml_tensor *>              kept;
    std::unordered_set<const ggml_tensor *> live;

    std::unordered_map<const ggml_tensor *, ggml_tensor *> replaced; // node -> what its consumers read instead
    std::unordered_map<const ggml_tensor *, std::vector<ggml_tensor *>>
            behind; // node -> nodes to compute right behind it

    std::unordered_map<const ggml_tensor *, std::pair<ggml_tensor *, ggml_tensor *>>
            running; // by the branch: see input_output
};
