#pragma once

#include "ggml.h"

#include <cstdint>

// Quantized weights of the CPU can be unpacked to F16 in each ubatch, before a product with many tokens. For some types
// this is faster than ggml's product with the quantized weights. Few tokens, as in answers, still read these.
// Activations are rounded to F16 too. ggml would make larger ones than 65,504 infinite, so they become 65,504 here.

// least tokens of a ubatch that pay for unpacking
static constexpr int64_t ADASKIP_UNPACK_LEAST = 64;

// most products of a layer whose weights are unpacked
static constexpr uint32_t ADASKIP_MOST_UNPACKED = 16;

// Whether t is a quantized matrix of a layer that lies in the CPU's memory as in the file. Only on x86 with F16C: there
// ggml sums products of F16 in F32. On ARM it sums them in F16.
bool adaskip_can_unpack(const ggml_tensor * t);

// a node that computes the F16 values of such a matrix, or of an F32 matrix of activations
ggml_tensor * adaskip_to_f16(ggml_context * ctx, ggml_tensor * t);
