#include "adaskip-window.h"

#include "adaskip-error.h"
#include "adaskip-llama.h"

#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// numbers of cells are multiples of this, as llama_kv_cache::get_n_kv pads them; all backends compute these well
static constexpr int64_t ADASKIP_CELLS = 256;

int32_t adaskip_sliding_window(const llama_hparams & hparams, int32_t il) {
    return hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa(il) ? (int32_t) hparams.n_swa : 0;
}

//
// adaskip_kv_reads
//

static bool is_view_of_memory(const ggml_tensor * t) {
    return t->view_src && t->view_src->op == GGML_OP_NONE && !(t->view_src->flags & GGML_TENSOR_FLAG_INPUT) &&
           t->ne[3] == 1 && t->nb[0] == ggml_type_size(t->type);
}

// whether a [n_embd_head, n_kv, n_head_kv] has the heads of a cell side by side
static bool has_rows_of_cells(const ggml_tensor * t) {
    return t->ne[2] == 1 || t->nb[2] == ggml_row_size(t->type, t->ne[0]);
}

// the tensor before a cast: flash attention reads an F16 copy of an F32 cache
static const ggml_tensor * behind_cast(const ggml_tensor * t) {
    return t->op == GGML_OP_CPY ? t->src[0] : t;
}

// FLASH_ATTN_EXT and SOFT_MAX have it in the same place
static float max_bias_of(const ggml_tensor * attention) {
    float res;
    std::memcpy(&res, attention->op_params + 1, sizeof(res));
    return res;
}

std::optional<adaskip_kv_reads> adaskip_kv_reads::find(ggml_cgraph * gf, ggml_tensor * attention) {
    adaskip_kv_reads res;
    res.attention = attention;
    if (!attention || max_bias_of(attention) != 0.0f) {
        return std::nullopt;
    }
    if (attention->op == GGML_OP_FLASH_ATTN_EXT) {
        if (!attention->src[3]) {
            return std::nullopt;
        }
        res.k = behind_cast(attention->src[1]);
        res.v = behind_cast(attention->src[2]);
        return is_view_of_memory(res.k) && has_rows_of_cells(res.k) && is_view_of_memory(res.v) &&
                               has_rows_of_cells(res.v)
                       ? std::optional(res)
                       : std::nullopt;
    }
    for (res.kq = attention->src[0]; res.kq->op == GGML_OP_SCALE || res.kq->op == GGML_OP_UNARY;) {
        res.kq = res.kq->src[0];
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_MUL_MAT && node->src[1] == attention) {
            res.kqv = node;
        }
    }
    if (res.kq->op != GGML_OP_MUL_MAT || !res.kqv) {
        return std::nullopt;
    }
    res.k = res.kq->src[0];
    res.v = res.kqv->src[0];

    // a cache for flash attention is transposed for a graph without it
    res.v_has_rows = res.v->op == GGML_OP_CONT && res.v->src[0]->op == GGML_OP_TRANSPOSE;
    if (res.v_has_rows) {
        res.v = res.v->src[0]->src[0];
    }
    const bool is_transposed = res.v->ne[2] == 1 || res.v->nb[2] == res.v->nb[1] * res.v->ne[1];
    return is_view_of_memory(res.k) && has_rows_of_cells(res.k) && is_view_of_memory(res.v) &&
                           (res.v_has_rows ? has_rows_of_cells(res.v) : is_transposed)
                   ? std::optional(res)
                   : std::nullopt;
}

//
// adaskip_window_input
//

// The cells that a ubatch reads, and those that each token sees. If a window leaves out no block of cells, as at the
// beginning of a prompt, all are read in place.
class adaskip_window_input : public llm_graph_input_i {
public:
    adaskip_window_input(ggml_context * ctx, const llama_kv_cache * cache, int64_t n_kv, int64_t n_ubatch,
            int32_t n_tokens, int32_t n_sinks, int32_t n_own, bool is_flash)
        : cache(cache), n_window(n_own > 0 ? std::min(n_tokens, n_own) : n_tokens), n_sinks(n_sinks), n_own(n_own) {
        const int64_t n_seen  = (int64_t) n_sinks + n_window - 1 + n_ubatch;
        const int64_t n_cells = std::min(GGML_PAD(n_seen, ADASKIP_CELLS), n_kv);

        mask = ggml_new_tensor_2d(ctx, is_flash ? GGML_TYPE_F16 : GGML_TYPE_F32, n_cells, n_ubatch);
        ggml_set_input(mask);
        if (n_cells < n_kv) {
            cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_cells);
            ggml_set_input(cells);
        }
    }

    void set_input(const llama_ubatch * ubatch) override {
        if (!mask->buffer || (cells && !cells->buffer)) {
            return; // no attention in the graph reads them
        }
        const auto [first, last] = std::minmax_element(ubatch->pos, ubatch->pos + ubatch->n_tokens);
        const llama_pos begin    = *first - n_window + 1;

        std::vector<int32_t>   ids;
        std::vector<llama_pos> positions;
        const llama_seq_id     seq_id = ubatch->seq_id[0][0];
        const auto &           pairs  = adaskip_seq_pos(adaskip_kv::cells_of(cache, seq_id), seq_id);
        const auto             take   = [&](llama_pos from, llama_pos to) {
            for (auto it = pairs.lower_bound({ from, 0 }); it != pairs.end() && it->first < to; ++it) {
                positions.push_back(it->first);
                ids.push_back((int32_t) it->second);
            }
        };
        take(0, std::min(n_sinks, begin));
        take(std::max(begin, 0), *last + 1);
        if ((int64_t) ids.size() > mask->ne[0]) {
            throw adaskip_exception(ADASKIP_ERROR_INTERNAL, "several KV cells hold one position of a sequence");
        }
        std::vector<float> visible(ggml_nelements(mask), -INFINITY);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            for (size_t j = 0; j < positions.size(); ++j) {
                const bool is_near = positions[j] > ubatch->pos[i] - n_window || positions[j] < n_sinks;
                const bool is_seen = n_own == 0 || positions[j] > ubatch->pos[i] - n_own;
                if (positions[j] <= ubatch->pos[i] && is_near && is_seen) {
                    visible[i * mask->ne[0] + (cells ? (int32_t) j : ids[j])] = 0.0f;
                }
            }
        }
        if (cells) {
            ids.resize(cells->ne[0], 0);
            ggml_backend_tensor_set(cells, ids.data(), 0, ggml_nbytes(cells));
        }
        if (mask->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(mask, visible.data(), 0, ggml_nbytes(mask));
            return;
        }
        std::vector<ggml_fp16_t> halves(visible.size());
        ggml_fp32_to_fp16_row(visible.data(), halves.data(), (int64_t) visible.size());
        ggml_backend_tensor_set(mask, halves.data(), 0, ggml_nbytes(mask));
    }

    // the tensors depend on the numbers of tokens and of cells in use, which llama.cpp has compared
    bool can_reuse(const llm_graph_params &) override { return true; }

    ggml_tensor * cells = nullptr; // I32 [n_cells], null if all are read in place
    ggml_tensor * mask;            // [n_cells, n_tokens]

private:
    const llama_kv_cache * const cache;
    const int32_t                n_window;
    const int32_t                n_sinks;
    const int32_t                n_own;
};

//
// adaskip_window
//

const adaskip_window_input & adaskip_window::input_of(const adaskip_kv_reads & reads, int32_t n_own) {
    const auto * cache = kv.cache_of(reads.k->view_src);
    if (!cache) {
        throw adaskip_exception(ADASKIP_ERROR_INTERNAL, "the KV cache of an attention was not found");
    }
    auto & input = inputs[{ cache, !reads.kq }];
    if (!input) {
        const ggml_tensor * q = reads.kq ? reads.kq->src[1] : reads.attention->src[0];

        auto made = std::make_unique<adaskip_window_input>(
                ctx, cache, reads.k->ne[1], q->ne[1], n_tokens, n_sinks, n_own, !reads.kq);
        input = made.get();
        res.add_input(std::move(made));
    }
    return *input;
}

// the rows of these cells, F32 [n_embd_head * n_head_kv, n_cells]
static ggml_tensor * gather(ggml_context * ctx, const ggml_tensor * view, ggml_tensor * cells) {
    ggml_tensor * rows =
            ggml_view_2d(ctx, view->view_src, view->ne[0] * view->ne[2], view->ne[1], view->nb[1], view->view_offs);
    return ggml_get_rows(ctx, rows, cells);
}

// the same for a transposed cache
static ggml_tensor * gather_columns(ggml_context * ctx, const ggml_tensor * view, ggml_tensor * cells) {
    ggml_tensor * columns =
            ggml_view_2d(ctx, view->view_src, view->ne[0], view->ne[1] * view->ne[2], view->nb[1], view->view_offs);
    return ggml_get_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, columns)), cells);
}

// changes the number of cells of a node that is not allocated yet
static void resize(ggml_tensor * t, int64_t n_cells) {
    t->ne[0] = n_cells;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        t->nb[i] = t->nb[i - 1] * t->ne[i - 1];
    }
}

void adaskip_window::narrow(const adaskip_kv_reads & reads, int32_t n_own) {
    const auto & input = input_of(reads, n_own);
    if (!input.cells) {
        reads.attention->src[reads.kq ? 1 : 3] = input.mask;
        return;
    }
    const int64_t n_cells = input.cells->ne[0];

    // [n_embd_head, n_head_kv, n_cells] -> [n_embd_head, n_cells, n_head_kv]
    const auto heads = [&](ggml_tensor * rows, int64_t n_embd_head) {
        return ggml_permute(
                ctx, ggml_reshape_3d(ctx, rows, n_embd_head, rows->ne[0] / n_embd_head, n_cells), 0, 2, 1, 3);
    };
    // rows are gathered as F32, so they are cast to the cache's type, or to flash attention's F16
    const auto type_of = [&](const ggml_tensor * view) {
        const bool is_float = view->type == GGML_TYPE_F32 || view->type == GGML_TYPE_BF16;
        return reads.kq && is_float ? view->type : GGML_TYPE_F16;
    };
    ggml_tensor * k = heads(ggml_cast(ctx, gather(ctx, reads.k, input.cells), type_of(reads.k)), reads.k->ne[0]);

    if (!reads.kq) {
        reads.attention->src[1] = k;
        reads.attention->src[2] =
                heads(ggml_cast(ctx, gather(ctx, reads.v, input.cells), type_of(reads.v)), reads.v->ne[0]);
        reads.attention->src[3] = input.mask;
        return;
    }
    ggml_tensor * v = reads.v_has_rows ? heads(gather(ctx, reads.v, input.cells), reads.v->ne[0])
                                       : heads(gather_columns(ctx, reads.v, input.cells), reads.v->ne[1]);

    reads.kq->src[0]        = k;
    reads.kqv->src[0]       = ggml_cast(ctx, ggml_permute(ctx, v, 1, 0, 2, 3), type_of(reads.v));
    reads.attention->src[1] = input.mask;
    for (ggml_tensor * t = reads.attention; t != reads.kq; t = t->src[0]) {
        resize(t, n_cells);
    }
    resize(reads.kq, n_cells);
}
