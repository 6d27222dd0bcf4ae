#pragma once

#include "adaskip.h"

#include "ggml.h"

#include <array>
#include <cstdint>
#include <unordered_set>
#include <vector>

struct llama_context;
struct llama_ubatch;
class adaskip_pass;
struct adaskip_skip_set;

// a further flag beside enum adaskip_statistics_flags: only the FFNs, for the online stage
static constexpr int32_t ADASKIP_STATISTICS_ONLINE = 1 << 16;

// Adds the reductions to a graph, and reads them after its computation.
class adaskip_observer {
public:
    // statistics of one ubatch in the layout of adaskip_statistics; activations are valid until the next computation
    struct result {
        std::vector<float> values; // empty if nothing is observed
        std::vector<float> layer_dot;
        std::vector<float> sums;

        std::vector<const float *> activations;
    };

    // observes nothing from now on
    void clear();

    // flags: enum adaskip_statistics_flags, or ADASKIP_STATISTICS_ONLINE; bulk: for ADASKIP_STATISTICS_OF_BULK
    void add_to(adaskip_pass & pass, int32_t flags, const adaskip_skip_set & bulk);

    result read(const llama_context & lctx, const llama_ubatch & ubatch);

    // frees the memory that read() keeps
    void free_copies() { device_copies.clear(); }

    // graphs with another value have another shape
    bool reduces_on_device() const { return on_device; }

    // bytes that each read() copies
    int64_t n_bytes() const;

private:
    // u·v of every row: reduced on the device, or on the host from u and v; indices of `reductions`, -1 for none
    struct dot_product {
        int reduced = -1;
        int u       = -1;
        int v       = -1;
    };

    // indices of one sublayer's figures in `reductions`, -1 if it is not observed
    struct observation {
        dot_product dot;
        dot_product u_sq;
        dot_product v_sq;

        int sum_u = -1; // the sum over tokens, or the values if the host adds them
        int sum_v = -1;
        int u     = -1;
        int v     = -1;
    };

    int reduce(adaskip_pass & pass, ggml_tensor * a, ggml_tensor * b, ggml_tensor * node);
    int sum_over_tokens(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node);
    int values_of(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node);
    int add_reduction(adaskip_pass & pass, ggml_tensor * t, ggml_tensor * node);

    std::vector<const float *> read_reductions(const llama_context & lctx);

    bool    on_device = true; // whether the last graph reduces on the device
    int32_t flags     = 0;

    std::vector<ggml_tensor *>      reductions;    // F32, n_rows or n_embd values each, or all values of a stream
    std::vector<std::vector<float>> device_copies; // of reductions outside the host's memory

    std::unordered_set<const ggml_tensor *> overwritten; // tensors that a later node writes to in place

    std::vector<std::array<observation, 2>> observations; // [n_layer][2]
    std::vector<dot_product>                layer_dots;   // [n_layer]
};
