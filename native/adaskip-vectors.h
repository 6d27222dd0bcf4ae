#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;

// Room for the metadata of n tensors. ggml would end the process where it finds no memory for them; this throws.
struct adaskip_tensors {
    explicit adaskip_tensors(size_t n);

    std::unique_ptr<uint8_t[]> mem;
    ggml_context_ptr           ctx;
};

// Counts what holds buffers on devices, whenever one such thing is gone. An rpc-server forgets its last graph with
// every buffer that it frees, and ends a client that has it computed once more; so no graph is reused after that.
struct adaskip_freed {
    static std::atomic<int64_t> n;

    ~adaskip_freed() { ++n; }
};

// One array per skipped sublayer of a plan, each in a buffer on its layer's own device.
struct adaskip_vectors {
    adaskip_freed                        freed;
    std::vector<ggml_tensor *>           tensors; // [n_layer][2], null where there is none
    std::vector<adaskip_tensors>         ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};

using adaskip_vectors_ptr = std::shared_ptr<adaskip_vectors>;

// uploads data[n_layer][2][ne1][ne0] where skip is 1, maps in BF16 where that is faster and the model's own weights are
// no F32 either; throws if a device has no room
adaskip_vectors_ptr adaskip_vectors_init(const llama_model & model, const std::vector<uint8_t> & skip,
        const float * data, int64_t ne0, int64_t ne1, bool is_map);
