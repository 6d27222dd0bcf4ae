// adaskip: skip attention or FFN sublayers of a llama.cpp model, and measure how much each of them changes the
// residual stream.
//
// This is the whole C ABI. The Python package reads this file through cffi as it is, so it holds plain C declarations
// only, and preprocessor lines that can be dropped.
//
// Conventions
//   - A model has n_layer layers with two sublayers each. Arrays over sublayers are [n_layer][2], attention first.
//   - Every function that returns int32_t returns ADASKIP_OK or an ADASKIP_ERROR_*; adaskip_last_error() then holds one
//     line for the calling thread. Nothing here asserts, throws or aborts on a bad argument, and a failed call changes
//     nothing.
//   - A context is used from one thread at a time, as in llama.h.

#ifndef ADASKIP_H
#define ADASKIP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ADASKIP_ABI_VERSION 12

struct llama_context;
struct llama_vocab;

enum adaskip_error {
    ADASKIP_OK                  = 0,
    ADASKIP_ERROR_ARGUMENT      = -1, // a null pointer, an unknown enum value, a wrong length
    ADASKIP_ERROR_NOT_SKIPPABLE = -2, // the plan names a sublayer that cannot be taken out of this model
    ADASKIP_ERROR_COMPENSATION  = -3, // a scale is not finite or not positive
    ADASKIP_ERROR_INTERNAL      = -4, // llama.cpp failed or threw
    ADASKIP_ERROR_KV_ELIDED     = -5, // the plan runs an attention for which this context has no KV
    ADASKIP_ERROR_KV_STALE      = -6, // the plan may not read an earlier position
    ADASKIP_ERROR_MEMORY        = -7, // the host or a device has no room
    ADASKIP_ERROR_SEQUENCES     = -8, // the plan counts tokens of one request, the context holds several sequences
    ADASKIP_ERROR_SAMPLER       = -9, // no token can be sampled, or the grammar cannot be read or would take for ever
};

// what the tokens of the next llama_decode calls are
enum adaskip_phase {
    ADASKIP_PHASE_BULK    = 0, // tokens of a prompt of which nobody reads more than their K and V
    ADASKIP_PHASE_PREFILL = 1, // all other tokens of a prompt; a context starts here
    ADASKIP_PHASE_DECODE  = 2, // generated tokens, drafts included
};

enum adaskip_kind {
    ADASKIP_ATTENTION = 0,
    ADASKIP_FFN       = 1,
};

// what to compute beside the model; flags, 0 for nothing
enum adaskip_statistics_flags {
    // Per-token reductions of every sublayer that runs. Logits stay bit-identical; what runs on the output tokens only,
    // as the last layer's FFN does in llama.cpp, is observed for those.
    ADASKIP_STATISTICS_ON = 1,
    // Every sublayer sees every token. The output head is left out: no logits and no embeddings are computed.
    ADASKIP_STATISTICS_ALL_TOKENS = 2,
    // Sums over the tokens of every sublayer's input and output, for mean error vectors.
    ADASKIP_STATISTICS_VECTORS = 4,
    // Every sublayer's input and output themselves. Many bytes: for fitting what stands in for a sublayer.
    ADASKIP_STATISTICS_ACTIVATIONS = 8,
};

// one sublayer of the model, as found in its compute graph
struct adaskip_sublayer {
    int32_t layer;
    int32_t kind;      // enum adaskip_kind
    int32_t skippable; // 0 or 1
    int32_t in_bulk;   // 0 or 1: skippable where K and V are kept, as the bulk keeps them
    int32_t shape;  // equal for sublayers of equal weights, cache and window that both compute K and V or both do not,
                    // which take equally long; -1 if not found
    int32_t window; // tokens that an attention looks back at, 0 for all
    int32_t windowable;  // 0 or 1: an attention that the bulk may let look back at a window
    char    reason[160]; // why it is not skippable in every phase, empty when it is
};

// which sublayers to skip, and what stands in for each: v := scale * u + bias + up * (down * u); a map whose `up` is
// all zeros is none, and costs nothing
struct adaskip_set {
    int32_t         n_layer; // must equal the model's
    int32_t         n_embd;  // must equal the model's where bias or down is not NULL
    int32_t         n_rank;  // > 0 where down is not NULL
    const uint8_t * skip;    // [n_layer][2], 0 or 1
    const float *   scale;   // [n_layer][2], read where skip is 1; > 0; a scale of 1 costs nothing
    const float *   bias;    // [n_layer][2][n_embd], read where skip is 1; finite; NULL for none
    const float *   down;    // [n_layer][2][n_rank][n_embd], likewise
    const float *   up;      // [n_layer][2][n_embd][n_rank], likewise; NULL where down is
};

// Online importance learning: in decode, the first `window` tokens of a request observe the FFNs that run; then every
// FFN whose mean IO similarity reached the threshold is skipped for the rest of the request.
enum adaskip_online_scale {
    ADASKIP_ONLINE_SCALE_NONE   = 0, // 1
    ADASKIP_ONLINE_SCALE_NORM   = 1, // ||V||_F / ||U||_F over the window
    ADASKIP_ONLINE_SCALE_MEDIAN = 2, // median over the window of |v| / |u| per token
};

struct adaskip_online_params {
    int32_t window;    // tokens, >= 1
    int32_t scale;     // enum adaskip_online_scale
    double  threshold; // finite; skipped if mean similarity >= threshold
};

// a set that holds from the start-th decoded token of a request on
struct adaskip_step {
    int32_t            start;
    struct adaskip_set set;
};

// what to skip in each phase
struct adaskip_plan {
    uint64_t tag; // what adaskip_get_plan_tag() tells while this plan is in force

    // Its attentions compute and store their K and V from the stream as it is, so that later tokens may attend to them,
    // and nothing else. NULL: run everything. Needs a context with KV for every attention.
    const struct adaskip_set * bulk;

    // Attentions that run in the bulk and look back at `window` tokens alone, a token itself included, and at positions
    // below n_sinks. What they store is of the stream that this leaves. NULL for none. A ubatch of the bulk is then of
    // one sequence. Without `bulk` it is not read.
    const uint8_t * windowed; // [n_layer], 0 or 1
    int32_t         window;   // >= 1 where windowed is not NULL
    int32_t         n_sinks;  // >= 0, likewise

    const struct adaskip_set * prefill; // NULL: run everything

    // starts[0] must be 0, starts ascend, and each set skips every attention that the one before it skips
    const struct adaskip_step * decode;   // [n_decode]
    int32_t                     n_decode; // 0: run everything

    const struct adaskip_online_params * online; // NULL for none

    // Ids of bulk sets of other plans, see adaskip_bulk_set_id: positions computed under them may be read too. Bulk
    // sets keep all K and V, so nothing is missing there. An id of any other set lets the plan read K and V that were
    // never written. A context with elided KV takes none.
    const uint64_t * readable;   // [n_readable], NULL for none; 0, the whole model, may always be read
    int32_t          n_readable; // >= 0
};

struct adaskip_online_state {
    int32_t   n_tokens;   // tokens observed in this request, at most the window
    int32_t   done;       // 1 once the window is full and the FFNs were chosen
    double *  similarity; // [n_layer], NaN where not observed; may be NULL
    double *  norm_ratio; // [n_layer], ||V||_F / ||U||_F, likewise
    double *  scale;      // [n_layer], what stands in for an FFN that is added, likewise
    uint8_t * added;      // [n_layer], 1 for the FFNs that were added; may be NULL
};

// statistics of one ubatch; NaN where not observed; the arrays live until the callback returns
struct adaskip_statistics {
    int32_t         n_layer;
    int32_t         n_tokens;
    int32_t         n_embd;
    int32_t         phase;     // enum adaskip_phase
    const int32_t * positions; // [n_tokens]
    const float *   values;    // [n_layer][2][3][n_tokens]: dot(u, v), |u|^2, |v|^2
    const float *   layer_dot; // [n_layer][n_tokens]: dot of the layer's input and its output
    const float *   sums;      // [n_layer][2][2][n_embd]: sum of u, sum of v; NULL without ADASKIP_STATISTICS_VECTORS

    // [n_layer][2][2], each [n_tokens][n_embd]: u and v; NULL where a sublayer does not see every token of the ubatch;
    // NULL itself without ADASKIP_STATISTICS_ACTIVATIONS
    const float * const * activations;
};

typedef void (*adaskip_statistics_callback)(const struct adaskip_statistics * statistics, void * user_data);

struct adaskip_counters {
    int64_t n_nodes_full;   // nodes of the last graph as llama.cpp built it
    int64_t n_nodes;        // nodes of the last graph as it was computed
    int64_t n_splits;       // parts of it that run on one device each
    int64_t n_graphs_built; // since the context was created
    int64_t n_graphs_reused;
    int64_t n_bytes_kv;         // buffers of the context's memory (KV cache, recurrent state), all devices together
    int64_t n_bytes_statistics; // bytes of statistics that the host read since the context was created
};

int32_t      adaskip_abi_version(void);
const char * adaskip_last_error(void);

// ggml_tensor_overhead() of the ggml that this library was compiled for; with another one, tensors have another layout
size_t adaskip_ggml_tensor_overhead(void);

// number of layers, or an ADASKIP_ERROR_*
int32_t adaskip_n_layer(const struct llama_context * ctx);

// number of layers up to the last one that has KV or a state of its own; those above it read what others wrote
int32_t adaskip_n_layer_kv(const struct llama_context * ctx);

// fills out[2*n_layer]; builds one graph to look at, so the next llama_decode rebuilds its own
int32_t adaskip_sublayers(struct llama_context * ctx, struct adaskip_sublayer * out, int32_t n_out);

// Sets a copy of the plan, all of it or, on an error, nothing; NULL runs the whole model, with tag 0. Begins a request.
// A context of several sequences takes no schedule and no online stage, which count the tokens of one request.
int32_t adaskip_set_plan(struct llama_context * ctx, const struct adaskip_plan * plan);

// The id of the plan's bulk set together with its windows, in every context and process the same; 0 where that leaves
// the whole model. Of the plan, bulk, windowed, window and n_sinks are read, and checked as by adaskip_set_plan;
// nothing is set.
int32_t adaskip_bulk_set_id(struct llama_context * ctx, const struct adaskip_plan * plan, uint64_t * id);

// the tag of the plan in force
int32_t adaskip_get_plan_tag(const struct llama_context * ctx, uint64_t * tag);

// what the online stage has learned in this request
int32_t adaskip_get_online(const struct llama_context * ctx, struct adaskip_online_state * state);

// A new request: no token is decoded yet, and the online stage starts again from the plans that were set.
int32_t adaskip_begin_request(struct llama_context * ctx);

int32_t adaskip_set_phase(struct llama_context * ctx, int32_t phase);

// Contexts that this thread creates from now on have no KV for the attentions that are 1 in skipped[n_layer]; NULL ends
// it. Such a context only decodes under plans that skip them. Of layers of one shape, the first keeps its KV if all
// are 1. Layers that read the KV of others have none to leave out, and a layer that others read keeps it: for both, 1
// counts as 0.
int32_t adaskip_elide_kv(const uint8_t * skipped, int32_t n_layer);

// fills elided[n_layer] with 1 where this context has no KV
int32_t adaskip_get_elided_kv(const struct llama_context * ctx, uint8_t * elided, int32_t n_layer);

// flags: enum adaskip_statistics_flags, with ADASKIP_STATISTICS_ON; or 0 to stop, then callback may be NULL
int32_t adaskip_set_statistics(
        struct llama_context * ctx, int32_t flags, adaskip_statistics_callback callback, void * user_data);

// The ADASKIP_ERROR_* for which a llama_decode, llama_encode or llama_sampler_sample failed since the last call of this
// function, else ADASKIP_OK: then llama.cpp itself failed, if anything did. Of a llama_tokenize that returned
// INT32_MIN, adaskip_last_error() tells why.
int32_t adaskip_take_failure(struct llama_context * ctx);

// ADASKIP_OK for what llama_sampler_init_grammar takes: it returns NULL for any other, and does not tell why
int32_t adaskip_check_grammar(const struct llama_vocab * vocab, const char * grammar, const char * root);

int32_t adaskip_get_counters(const struct llama_context * ctx, struct adaskip_counters * out);

// A position may be read if it was computed by the whole model, under a set that the plan in force uses (what its
// online stage made included) or under one that it names as readable; if it has K and V of every attention that is
// to run now; and if it counts no more moves than adaskip_set_most_moves allows. llama.cpp's memory keeps for every
// position what it was computed under, also where sequences are copied, shifted and saved, and llama_decode fails
// (returns < 0, nothing computed) where it would read any other.

// first position of the sequence that the plan in force may not read in this phase; INT32_MAX when there is none
int32_t adaskip_kv_first_stale(const struct llama_context * ctx, int32_t seq_id, int32_t phase, int32_t * pos);

// Runs of a prompt that another one has too, in another order or behind other text, can be used again: their cells are
// set aside, what is new before each is decoded, and the run is taken back. Its K and V are those of its old place,
// where other text stood before it. So a moved position may only be read where that is allowed, and counts its moves.

// Cells of positions from, from + 1, ... from + n - 1 that belong at to, to + 1, ... The move counts as n_moves, 1 to
// 255: one that changes more of the text before a run can count as several. Where a run stays in its place, and so does
// all text before it, 0 leaves its cells as they are.
struct adaskip_run {
    int32_t from;
    int32_t to;
    int32_t n;
    int32_t n_moves;
};

// positions that count at most so many moves may be read; 0, which a context starts with: none that was moved
int32_t adaskip_set_most_moves(struct llama_context * ctx, int32_t most_moves);

// 1 where cells can be moved, 0 where the memory has a state or K that llama.cpp cannot shift
int32_t adaskip_can_move(const struct llama_context * ctx);

// Takes runs out of the sequence and forgets its other positions from n_kept on. Neither the old nor the new places of
// two runs overlap, those set aside before included, and all are at n_kept or later. Fails, and changes nothing, where
// the memory lacks a position of a run, as a sliding window may, or one would count more than 255 moves.
int32_t adaskip_set_aside(
        struct llama_context * ctx, int32_t seq_id, int32_t n_kept, const struct adaskip_run * runs, int32_t n_runs);

// Takes back what was set aside and now stands before position `end`. llama_memory_seq_rm with a negative seq_id
// forgets what is left.
int32_t adaskip_take_back(struct llama_context * ctx, int32_t seq_id, int32_t end);

#ifdef __cplusplus
}
#endif

#endif // ADASKIP_H
