// Skips attention or FFN sublayers of a llama.cpp model, and measures how much each changes the residual stream.
//
// This is the whole C ABI. The Python package reads this file with cffi, which drops the preprocessor lines. All else
// must be plain C declarations.
//
// Conventions
//   - A model has n_layer layers with two sublayers each. Arrays over sublayers are [n_layer][2], attention first.
//   - Functions that return int32_t return ADASKIP_OK or an ADASKIP_ERROR_*. adaskip_last_error() then has one line for
//     the calling thread. No bad argument ends the process or throws, and a failed call changes nothing.
//   - The caller owns all arrays. Functions copy what they keep of them.
//   - A context is used from one thread at a time, as in llama.h.

#ifndef ADASKIP_H
#define ADASKIP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ADASKIP_ABI_VERSION 16

struct llama_context;
struct llama_vocab;

enum adaskip_error {
    ADASKIP_OK                  = 0,
    ADASKIP_ERROR_ARGUMENT      = -1, // a null pointer, an unknown enum value, a wrong length
    ADASKIP_ERROR_NOT_SKIPPABLE = -2, // the plan names a sublayer that cannot be skipped in this model
    ADASKIP_ERROR_COMPENSATION  = -3, // a scale is not positive, or a value is not finite
    ADASKIP_ERROR_INTERNAL      = -4, // llama.cpp failed or threw
    ADASKIP_ERROR_KV_ELIDED     = -5, // the plan runs an attention for which this context has no KV
    ADASKIP_ERROR_KV_STALE      = -6, // the plan may not read an earlier position
    ADASKIP_ERROR_MEMORY        = -7, // the host or a device has no room
    ADASKIP_ERROR_SEQUENCES     = -8, // the plan is for one sequence at a time, and there are several
    ADASKIP_ERROR_SAMPLER       = -9, // no token can be sampled, or the grammar is invalid or takes too much time
};

// the role of the tokens in the next llama_decode calls
enum adaskip_phase {
    ADASKIP_PHASE_BULK    = 0, // tokens of a prompt whose K and V alone are used
    ADASKIP_PHASE_PREFILL = 1, // all other tokens of a prompt; the phase of a new context
    ADASKIP_PHASE_DECODE  = 2, // generated tokens, drafts included
    ADASKIP_PHASE_NARROW  = 3, // as BULK, but with its windows alone; as PREFILL if it has none, or if prefill skips
};

enum adaskip_kind {
    ADASKIP_ATTENTION = 0,
    ADASKIP_FFN       = 1,
};

// statistics to compute; flags, 0 for none
enum adaskip_statistics_flags {
    // Per-token reductions of every sublayer that runs. Logits stay bit-identical. llama.cpp runs the last layer's FFN
    // on output tokens only, so it is observed for those alone.
    ADASKIP_STATISTICS_ON = 1,
    // Every sublayer sees every token. The output head is left out: no logits and no embeddings are computed.
    ADASKIP_STATISTICS_ALL_TOKENS = 2,
    // Sums of every sublayer's input and output over the tokens, for mean error vectors.
    ADASKIP_STATISTICS_VECTORS = 4,
    // Every sublayer's whole input and output, for fitting compensation. These are many bytes.
    ADASKIP_STATISTICS_ACTIVATIONS = 8,
    // Only the sublayers that the plan's bulk skips, and only their inputs and outputs. Needs the flag before.
    ADASKIP_STATISTICS_OF_BULK = 16,
};

enum adaskip_types {
    ADASKIP_N_TYPES = 64, // of ggml, at most
};

// one sublayer of the model, as found in its compute graph
struct adaskip_sublayer {
    int32_t layer;
    int32_t kind;        // enum adaskip_kind
    int32_t skippable;   // 0 or 1: in every phase
    int32_t in_bulk;     // 0 or 1: in the bulk, which keeps K and V
    int32_t shape;       // Equal for sublayers that take equally long: those of equal weights, cache and window that
                         // all compute K and V, or all read another layer's. -1 if not found.
    int32_t window;      // tokens that an attention of the model looks back at, 0 for all
    int32_t windowable;  // 0 or 1: whether a plan can let this attention look back at a smaller window in the bulk
    char    reason[160]; // why it is not skippable in every phase, else empty
};

// The sublayers to skip, and their compensation: v := scale * u + bias + up * (down * u). A map whose `up` is all zeros
// is not computed.
struct adaskip_set {
    int32_t         n_layer; // must equal the model's
    int32_t         n_embd;  // must equal the model's if bias or down is not NULL
    int32_t         n_rank;  // > 0 if down is not NULL
    const uint8_t * skip;    // [n_layer][2], 0 or 1
    const float *   scale;   // [n_layer][2], read where skip is 1; > 0; a scale of 1 is not computed
    const float *   bias;    // [n_layer][2][n_embd], read where skip is 1; finite; NULL for none
    const float *   down;    // [n_layer][2][n_rank][n_embd], likewise
    const float *   up;      // [n_layer][2][n_embd][n_rank], likewise; NULL if and only if down is
};

// The online stage: in decode, the first `window` tokens of a request observe the FFNs that run. For the rest of the
// request, every FFN whose mean IO similarity reached the threshold is skipped, with this scale.
enum adaskip_online_scale {
    ADASKIP_ONLINE_SCALE_NONE   = 0, // 1
    ADASKIP_ONLINE_SCALE_NORM   = 1, // ||V||_F / ||U||_F over the window
    ADASKIP_ONLINE_SCALE_MEDIAN = 2, // median over the window of |v| / |u| per token
};

struct adaskip_online_params {
    int32_t window;    // tokens, >= 1
    int32_t scale;     // enum adaskip_online_scale
    double  threshold; // finite
};

// a set that holds from the start-th decoded token of a request on
struct adaskip_step {
    int32_t            start;
    struct adaskip_set set;
};

// the sublayers to skip in each phase
struct adaskip_plan {
    uint64_t tag; // any number; adaskip_get_plan_tag() returns it while this plan is in force

    // Skipped attentions of the bulk still store their K and V, so that later tokens may attend to them. NULL: run
    // everything. Needs a context with KV for every attention.
    const struct adaskip_set * bulk;

    // Attentions that run in the bulk and look back at a window: the last `window` tokens, a token itself included, and
    // the positions below n_sinks. A ubatch of the bulk must then have one sequence. Ignored if `bulk` is NULL.
    const uint8_t * windowed; // [n_layer], 0 or 1; NULL for none
    int32_t         window;   // >= 1 if windowed is not NULL
    int32_t         n_sinks;  // >= 0, likewise

    // Whether adaskip_refit may replace the maps of the bulk, 0 or 1. Positions computed with different values of this
    // have different sets, and those computed before and after adaskip_refit have the same.
    int32_t refits;

    const struct adaskip_set * prefill; // NULL: run everything

    // starts[0] must be 0, starts ascend, and each set skips every attention that the set before it skips
    const struct adaskip_step * decode;   // [n_decode]
    int32_t                     n_decode; // 0: run everything

    const struct adaskip_online_params * online; // NULL for none

    // Ids of other plans' bulk sets, by adaskip_bulk_set_ids: positions computed under them may be read. They keep all
    // K and V. An id of another set would let the plan read K and V that were never written. A context with elided KV
    // refuses ids.
    const uint64_t * readable;   // [n_readable], NULL for none; 0, the whole model, may always be read
    int32_t          n_readable; // >= 0
};

struct adaskip_online_state {
    int32_t   n_tokens;   // tokens observed in this request, at most the window
    int32_t   done;       // 1 after the window, when the FFNs are chosen
    double *  similarity; // [n_layer], NaN if not observed; may be NULL
    double *  norm_ratio; // [n_layer], ||V||_F / ||U||_F, likewise
    double *  scale;      // [n_layer], the scale of an FFN if it is added, likewise
    uint8_t * added;      // [n_layer], 1 for the FFNs that were added; may be NULL
};

// Statistics of one ubatch. Values are NaN where nothing was observed. The arrays live until the callback returns.
struct adaskip_statistics {
    int32_t         n_layer;
    int32_t         n_tokens;
    int32_t         n_embd;
    int32_t         phase;     // enum adaskip_phase
    const int32_t * positions; // [n_tokens]
    const float *   values;    // [n_layer][2][3][n_tokens]: dot(u, v), |u|^2, |v|^2
    const float *   layer_dot; // [n_layer][n_tokens]: dot of the layer's input and its output
    const float *   sums;      // [n_layer][2][2][n_embd]: sum of u, sum of v; NULL without ADASKIP_STATISTICS_VECTORS

    // [n_layer][2][2], each [n_tokens][n_embd]: u and v. An element is NULL if its sublayer does not see every token of
    // the ubatch. The array is NULL without ADASKIP_STATISTICS_ACTIVATIONS.
    const float * const * activations;
};

typedef void (*adaskip_statistics_callback)(const struct adaskip_statistics * statistics, void * user_data);

struct adaskip_counters {
    int64_t n_nodes_full;   // nodes of the last graph as llama.cpp built it
    int64_t n_nodes;        // nodes of the last graph as it was computed
    int64_t n_splits;       // parts of it that run on one device each
    int64_t n_graphs_built; // since the context was created
    int64_t n_graphs_reused;
    int64_t n_bytes_kv;         // bytes of the context's memory (KV cache, recurrent state) on all devices together
    int64_t n_bytes_statistics; // bytes of statistics that the host read since the context was created
};

int32_t      adaskip_abi_version(void);
const char * adaskip_last_error(void); // valid until this thread's next call

// ggml_tensor_overhead() of the ggml that this library was compiled for; another value means another tensor layout
size_t adaskip_ggml_tensor_overhead(void);

// number of layers, or an ADASKIP_ERROR_*
int32_t adaskip_n_layer(const struct llama_context * ctx);

// number of layers up to the last one that has KV or a state of its own; those above it read other layers' KV
int32_t adaskip_n_layer_kv(const struct llama_context * ctx);

// number of positions that the model has learned embeddings for, which ggml asserts; 0 for any number
int32_t adaskip_n_positions(const struct llama_context * ctx);

// fills out[2*n_layer]; the first call builds a graph, so the next llama_decode rebuilds its own
int32_t adaskip_sublayers(struct llama_context * ctx, struct adaskip_sublayer * out, int32_t n_out);

// Sets a copy of the plan, and begins a request. NULL runs the whole model, with tag 0. Schedules and the online stage
// count the tokens of one request, so a context of several sequences refuses them.
int32_t adaskip_set_plan(struct llama_context * ctx, const struct adaskip_plan * plan);

// Fills ids[n] with the ids of n plans' bulk sets with their windows, equal in every context and process. An id is 0 if
// nothing is skipped or windowed. Reads and checks bulk, windowed, window and n_sinks of each plan, as adaskip_set_plan
// does. Sets nothing. Vectors and maps that plans share, at one address, are read once.
int32_t adaskip_bulk_set_ids(struct llama_context * ctx, const struct adaskip_plan * plans, uint64_t * ids, int32_t n);

// Replaces `up` of one map of the bulk in force, whose other half stays. up: [n_embd][n_rank], finite. n: their product
int32_t adaskip_refit(struct llama_context * ctx, int32_t layer, int32_t kind, const float * up, int32_t n);

// the tag of the plan in force
int32_t adaskip_get_plan_tag(const struct llama_context * ctx, uint64_t * tag);

// the online stage's observations in this request
int32_t adaskip_get_online(const struct llama_context * ctx, struct adaskip_online_state * state);

// Begins a request: no token is decoded yet, and the online stage starts again from the plan.
int32_t adaskip_begin_request(struct llama_context * ctx);

int32_t adaskip_set_phase(struct llama_context * ctx, int32_t phase);

// Elides KV: contexts that this thread creates from now on have no KV for the attentions that are 1 in
// skipped[n_layer]. NULL ends this. Such a context only decodes under plans that skip these attentions. If all layers
// of one shape are 1, the first keeps its KV. The 1 of a layer that reads another layer's KV, or whose KV others read,
// has no effect.
int32_t adaskip_elide_kv(const uint8_t * skipped, int32_t n_layer);

// fills elided[n_layer] with 1 where this context has no KV
int32_t adaskip_get_elided_kv(const struct llama_context * ctx, uint8_t * elided, int32_t n_layer);

// Ubatches of fewer tokens do without flash attention in a context that has it; 0 for none. ggml's CPU backend reads
// prompts faster with it, but few tokens after many slower. Fails if the cache has quantized V.
int32_t adaskip_set_flash_least(struct llama_context * ctx, int32_t n_tokens);

// Quantized weights can be unpacked: products with 64 and more tokens read them as F32. They must lie in the CPU's
// memory as in the file, not repacked. Each ubatch unpacks a matrix just before its product. ggml's CPU backend
// multiplies F32 faster than some quantized types. Results differ by rounding: activations are not rounded to 8 bits.

// fills out[ADASKIP_N_TYPES]: by ggml_type, the number of values of the layers' matrices that can be unpacked
int32_t adaskip_unpackable(const struct llama_context * ctx, int64_t * out, int32_t n_out);

// types: bit i is 1 if weights of ggml_type i are unpacked where they can be
int32_t adaskip_set_unpacked(struct llama_context * ctx, uint64_t types);

// Q5_0 weights can be repacked, where the CPU backend has a layout for Q8_0, which holds the same values. All products
// then read copies in this layout. Results differ by rounding.

// fills n_values with the number of values in weights that can be repacked
int32_t adaskip_repackable(const struct llama_context * ctx, int64_t * n_values);

// repacks these weights; a further call does nothing
int32_t adaskip_repack(struct llama_context * ctx);

// flags: 0 to stop, and callback may be NULL; else ADASKIP_STATISTICS_ON with other enum adaskip_statistics_flags
int32_t adaskip_set_statistics(
        struct llama_context * ctx, int32_t flags, adaskip_statistics_callback callback, void * user_data);

// The ADASKIP_ERROR_* of the last llama_decode, llama_encode or llama_sampler_sample that failed since the previous
// call. ADASKIP_OK if none failed, or if llama.cpp returned an error of its own. If llama_tokenize returns INT32_MIN,
// adaskip_last_error() has the reason.
int32_t adaskip_take_failure(struct llama_context * ctx);

// Checks a grammar: ADASKIP_OK if llama_sampler_init_grammar takes it. That function returns NULL without a reason.
int32_t adaskip_check_grammar(const struct llama_vocab * vocab, const char * grammar, const char * root);

int32_t adaskip_get_counters(const struct llama_context * ctx, struct adaskip_counters * out);

// A position may be read if all of these hold:
//   - it was computed by the whole model, under a set of the plan in force (results of its online stage included), or
//     under a set that the plan names as readable
//   - it has K and V of every attention that runs now
//   - it counts no more moves than adaskip_set_most_moves allows
// llama.cpp's memory keeps each position's set, also when sequences are copied, shifted and saved. llama_decode returns
// < 0 and computes nothing if it would read any other position.

// first position of the sequence that the plan in force may not read in this phase; INT32_MAX if there is none
int32_t adaskip_kv_first_stale(const struct llama_context * ctx, int32_t seq_id, int32_t phase, int32_t * pos);

// Runs that a prompt shares with an earlier one can be used again after other text: their cells are set aside, the new
// tokens before each run are decoded, and the run is taken back. Its K and V were computed after the text of its old
// place, so each position counts its moves.

// Cells of positions from, from + 1, ... from + n - 1, which move to to, to + 1, ... The move counts as n_moves, 1 to
// 255: more if more of the text before the run changes. If the run and all text before it stay in place, n_moves is 0,
// and the cells stay as they are.
struct adaskip_run {
    int32_t from;
    int32_t to;
    int32_t n;
    int32_t n_moves;
};

// allows reading positions that count at most this many moves; 0, no moved position, in a new context
int32_t adaskip_set_most_moves(struct llama_context * ctx, int32_t most_moves);

// 1 if cells can be moved. 0 if the memory has a state, or K that llama.cpp cannot shift or shifts wrong: it rotates
// layers that have no rotary embedding too, and scales K again if the embedding scales it.
int32_t adaskip_can_move(struct llama_context * ctx);

// Takes runs out of the sequence and removes its other positions from n_kept on. Neither the old nor the new places of
// two runs may overlap, runs set aside before included, and all must be at n_kept or later. Fails if the memory lacks a
// position of a run, as with a sliding window, or if one would count more than 255 moves.
int32_t adaskip_set_aside(
        struct llama_context * ctx, int32_t seq_id, int32_t n_kept, const struct adaskip_run * runs, int32_t n_runs);

// Takes back the cells set aside that now belong before position `end`. llama_memory_seq_rm with a negative seq_id
// removes the rest.
int32_t adaskip_take_back(struct llama_context * ctx, int32_t seq_id, int32_t end);

#ifdef __cplusplus
}
#endif

#endif // ADASKIP_H
