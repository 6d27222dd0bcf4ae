#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;

// Room for the metadata of n tensors. Without memory ggml would end the process; this throws.
struct adaskip_tensors {
    explicit adaskip_tensors(size_t n);

    std::unique_ptr<uint8_t[]> mem;
    ggml_context_ptr           ctx;
};

// Counts the owners of device buffers that were destroyed. An rpc-server forgets its last graph when it frees a buffer,
// and a client that computes the graph again ends. So no graph is reused after that.
struct adaskip_freed {
    static std::atomic<int64_t> n;

    ~adaskip_freed() { ++n; }
};

// One array per skipped sublayer of a plan, each in a buffer on its layer's device. Owns the buffers.
struct adaskip_vectors {
    adaskip_freed                        freed;
    std::vector<ggml_tensor *>           tensors; // [n_layer][2], null for none
    std::vector<adaskip_tensors>         ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};

using adaskip_vectors_ptr = std::shared_ptr<adaskip_vectors>;

// Uploads data[n_layer][2][ne1][ne0] where skip is 1, as F32. Matrices that decoded tokens read are BF16 if they read
// that faster, unless all weights of the model are F32. Throws if a device has no room.
adaskip_vectors_ptr adaskip_vectors_init(const llama_model & model, const std::vector<uint8_t> & skip,
        const float * data, int64_t ne0, int64_t ne1, bool is_decoded);

// replaces the values of one of its tensors by as many others
void adaskip_vector_set(ggml_tensor * t, const float * data);
