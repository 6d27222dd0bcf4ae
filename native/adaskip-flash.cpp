#include "adaskip-flash.h"

#include "adaskip-unpack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static constexpr int64_t ADASKIP_TILE   = 64; // rows
static constexpr int64_t ADASKIP_CHUNKS = 4;  // per thread

static constexpr int64_t ADASKIP_MOST_FILLED = 4 * ADASKIP_TILE; // tokens

// The time to look at the mask of a tile, in values of a head: a tile of 64 values takes 0.62 ms with 2,048 cells on a
// Xeon with AVX-512, one that sees nothing 0.2 ms.
static constexpr double ADASKIP_LOOK = 20.0;

static constexpr double ADASKIP_LEAST_GAIN = 0.9;      // else the copies take longer
static constexpr size_t ADASKIP_MOST_MASK  = 32 << 20; // bytes of all heads' masks

// Calls f(i) with the share of [0, n) that is this thread's.
template <typename F> static void in_threads(int64_t n, int ith, int nth, F && f) {
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; ++i) {
        f(i);
    }
}

// [n_embd, n_tokens, n_head] -> the same with more heads in each group, of zeros; src[1] has the groups' K
static void add_heads(ggml_tensor * dst, int ith, int nth, void * user_data) {
    GGML_UNUSED(user_data);
    const ggml_tensor * q       = dst->src[0];
    const int64_t       n_group = q->ne[2] / dst->src[1]->ne[2];
    const int64_t       n_more  = dst->ne[2] / dst->src[1]->ne[2];

    in_threads(dst->ne[1] * dst->ne[2], ith, nth, [&](int64_t i) {
        const int64_t token = i % dst->ne[1];
        const int64_t head  = i / dst->ne[1];
        char *        row   = (char *) dst->data + token * dst->nb[1] + head * dst->nb[2];
        if (head % n_more < n_group) {
            const int64_t from = head / n_more * n_group + head % n_more;
            std::memcpy(row, (const char *) q->data + token * q->nb[1] + from * q->nb[2], dst->nb[1]);
        } else {
            std::memset(row, 0, dst->nb[1]);
        }
    });
}

// [n_embd, n_head, n_tokens] without the added heads; src[1] as above
static void remove_heads(ggml_tensor * dst, int ith, int nth, void * user_data) {
    GGML_UNUSED(user_data);
    const ggml_tensor * src     = dst->src[0];
    const int64_t       n_group = dst->ne[1] / dst->src[1]->ne[2];
    const int64_t       n_more  = src->ne[1] / dst->src[1]->ne[2];

    in_threads(dst->ne[1] * dst->ne[2], ith, nth, [&](int64_t i) {
        const int64_t head  = i % dst->ne[1];
        const int64_t token = i / dst->ne[1];
        const int64_t from  = head / n_group * n_more + head % n_group;
        std::memcpy((char *) dst->data + head * dst->nb[1] + token * dst->nb[2],
                (const char *) src->data + from * src->nb[1] + token * src->nb[2], dst->nb[1]);
    });
}

// [n_kv, n_tokens] -> [n_kv, n_tokens, heads of a group], where added heads see nothing; the first n_group are no such
// heads
static void mask_heads(ggml_tensor * dst, int ith, int nth, void * n_group_) {
    const ggml_tensor * mask    = dst->src[0];
    const auto          n_group = (int64_t) (intptr_t) n_group_;
    const ggml_fp16_t   unseen  = ggml_fp32_to_fp16(-INFINITY);

    in_threads(dst->ne[1] * dst->ne[2], ith, nth, [&](int64_t i) {
        auto * row = (ggml_fp16_t *) ((char *) dst->data + i * dst->nb[1]);
        if (i / dst->ne[1] < n_group) {
            std::memcpy(row, (const char *) mask->data + i % dst->ne[1] * mask->nb[1], dst->nb[1]);
        } else {
            std::fill(row, row + dst->ne[0], unseen);
        }
    });
}

// The tiles of all heads, in tiles that see cells. Of each n_more heads, the first n_group do.
static double n_tiles(const ggml_tensor * q, int64_t n_group, int64_t n_more, int64_t n_head_kv, int n_threads) {
    const double  empty    = ADASKIP_LOOK / (double) q->ne[0];
    const int64_t n_tokens = q->ne[1];
    const int64_t n_rows   = n_tokens * n_more * n_head_kv;
    const int64_t n_chunk  = (n_rows + ADASKIP_CHUNKS * n_threads - 1) / (ADASKIP_CHUNKS * n_threads);

    double res = 0;
    for (int64_t at = 0; at < n_rows;) {
        const int64_t head = at / n_tokens;
        res += head % n_more < n_group ? 1.0 : empty;
        at = std::min({ at + ADASKIP_TILE, (head + 1) * n_tokens, (at / n_chunk + 1) * n_chunk });
    }
    return res;
}

// the number of heads per head of K with which all take least, the present one if no number saves enough
static int64_t heads_of_group(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * mask, int n_threads) {
    const int64_t n_group = q->ne[2] / k->ne[2];

    int64_t res   = n_group;
    double  least = ADASKIP_LEAST_GAIN * n_tiles(q, n_group, n_group, k->ne[2], n_threads);
    for (int64_t n_more = n_group + 1; n_more <= 4 * n_group && n_more * ggml_nbytes(mask) <= ADASKIP_MOST_MASK;
            ++n_more) {
        const double n = n_tiles(q, n_group, n_more, k->ne[2], n_threads);
        if (n < least) {
            least = n;
            res   = n_more;
        }
    }
    return res;
}

ggml_tensor * adaskip_flash::filled(const ggml_tensor * node) {
    if (node->op != GGML_OP_FLASH_ATTN_EXT || node->src[4]) {
        return nullptr;
    }
    ggml_tensor * const q    = node->src[0];
    ggml_tensor * const k    = node->src[1];
    ggml_tensor * const v    = node->src[2];
    ggml_tensor * const mask = node->src[3];

    float bias;
    std::memcpy(&bias, (const float *) node->op_params + 1, sizeof(bias));

    const bool is_plain = mask && mask->type == GGML_TYPE_F16 && ggml_is_matrix(mask) && ggml_is_contiguous(mask) &&
                          bias == 0.0f && q->type == GGML_TYPE_F32 && q->ne[3] == 1;

    // with fewer tokens, ggml computes no tiles; with many more, few tiles are saved
    if (!is_plain || n_threads < 2 || q->ne[1] < ADASKIP_TILE || q->ne[1] >= ADASKIP_MOST_FILLED) {
        return nullptr;
    }
    const ggml_tensor * memory = k;
    while (memory->op != GGML_OP_NONE && memory->src[0]) {
        memory = memory->src[0];
    }
    if (!adaskip_is_on_cpu(memory)) {
        return nullptr;
    }
    const int64_t n_group = q->ne[2] / k->ne[2];
    const int64_t n_more  = heads_of_group(q, k, mask, n_threads);
    if (n_more == n_group) {
        return nullptr;
    }
    ggml_tensor *& more_masks = masks[{ mask, n_group, n_more }];
    if (!more_masks) {
        ggml_tensor * args[] = { mask };
        more_masks = ggml_custom_4d(ctx, GGML_TYPE_F16, mask->ne[0], mask->ne[1], n_more, 1, args, 1, mask_heads,
                GGML_N_TASKS_MAX, (void *) (intptr_t) n_group);
    }
    ggml_tensor * args[] = { q, k };
    ggml_tensor * more   = ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], n_more * k->ne[2], 1, args, 2,
            add_heads, GGML_N_TASKS_MAX, nullptr);

    ggml_tensor * res = ggml_flash_attn_ext(ctx, more, k, v, more_masks, 1.0f, 0.0f, 0.0f);
    std::copy(std::begin(node->op_params), std::end(node->op_params), std::begin(res->op_params));

    args[0] = res;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, node->ne[0], node->ne[1], node->ne[2], 1, args, 2, remove_heads,
            GGML_N_TASKS_MAX, nullptr);
}
