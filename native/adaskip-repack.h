#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

struct llama_model;

// Copies of a model's Q5_0 weights for faster products. llama.cpp repacks weights of some types for the CPU, such as
// Q8_0 for AMX, and has no such layout for Q5_0. Q8_0 holds the values of Q5_0 exactly, so the copies are Q8_0. They
// take 1.5 times the memory of the weights, whose pages of the file nothing reads any more.
class adaskip_repacked {
public:
    // the number of values in weights that add() copies: the layers' Q5_0 matrices in the CPU's memory
    static int64_t n_values(const llama_model & model);

    // copies these weights; throws without memory
    void add(const llama_model & model);

    // the copy of a weight, or null
    ggml_tensor * find(const ggml_tensor * weight) const;

    bool empty() const { return copies.empty(); }

private:
    std::vector<ggml_context_ptr>                          contexts;
    std::vector<ggml_backend_buffer_ptr>                   buffers;
    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;
};
