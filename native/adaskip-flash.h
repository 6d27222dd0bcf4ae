#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <tuple>

// ggml's CPU backend cuts the rows of a flash attention, heads times tokens, into 4 chunks per thread. It computes
// tiles of 64 rows, and a tile ends where a head or a chunk does. So few tokens have many tiles with few rows, each of
// which takes as long as a full one: with 2 threads, 64 tokens of 4 heads have 8 tiles. With 4 more heads that see no
// cell, chunks are whole tiles: 4 of them, and 4 that are left out after a look at the mask. No row depends on another
// one, so the result stays the same.

// most tensors added per attention
static constexpr int ADASKIP_FLASH_TENSORS = 4;

class adaskip_flash {
public:
    adaskip_flash(ggml_context * ctx, int n_threads) : ctx(ctx), n_threads(n_threads) {}

    // Returns the tensor to compute in place of a node of any kind; null if it has no fewer tiles, or does not run on
    // the CPU.
    ggml_tensor * filled(const ggml_tensor * node);

private:
    ggml_context * const ctx;
    const int            n_threads;

    // by the mask of one head, and the heads of a group before and after
    std::map<std::tuple<const ggml_tensor *, int64_t, int64_t>, ggml_tensor *> masks;
};
