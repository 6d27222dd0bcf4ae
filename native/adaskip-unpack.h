#pragma once

#include "ggml.h"

#include <cstdint>

// Quantized weights of the CPU can be unpacked to F32 in each ubatch, before a product with many tokens. For some types
// this is faster than ggml's product with the quantized weights, which rounds activations to 8 bits. Few tokens, as in
// answers, still read these.

// least tokens of a ubatch that pay for unpacking
static constexpr int64_t ADASKIP_UNPACK_LEAST = 64;

// most products of a layer whose weights are unpacked
static constexpr uint32_t ADASKIP_MOST_UNPACKED = 16;

// whether the memory of t is the CPU's
bool adaskip_is_on_cpu(const ggml_tensor * t);

// whether t is a quantized matrix of a layer that lies in the CPU's memory as in the file
bool adaskip_can_unpack(const ggml_tensor * t);

// a node that computes the F32 values of such a matrix
ggml_tensor * adaskip_unpacked(ggml_context * ctx, ggml_tensor * t);
