// Runs our libllama without Python, where there is none: native_smoke MODEL.gguf [BROKEN.gguf ...]
//
// Evaluates the same tokens without a plan, with one, and without again, and prints their logits. Fails where the first
// and the last differ in a bit, or the plan changes nothing; and where a broken file is opened, or ends the process.

#include "adaskip.h"
#include "llama.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_PROMPT 12
#define N_DECODE 3

static int fail(const char * reason) {
    fprintf(stderr, "native_smoke: %s: %s\n", reason, adaskip_last_error());
    return 0;
}

// logits behind the prompt and behind each decoded token, [1 + N_DECODE][n_vocab]; NULL on failure
static float * evaluate(struct llama_context * ctx, int32_t n_vocab) {
    float * logits = malloc((1 + N_DECODE) * (size_t) n_vocab * sizeof(float));
    llama_memory_clear(llama_get_memory(ctx), true);
    adaskip_begin_request(ctx);
    int32_t position = 0;
    for (int32_t step = 0; step <= N_DECODE; ++step) {
        llama_token   tokens[N_PROMPT];
        const int32_t n_tokens = step == 0 ? N_PROMPT : 1;
        for (int32_t i = 0; i < n_tokens; ++i) {
            tokens[i] = (7 * position++ + 3) % n_vocab;
        }
        if (adaskip_set_phase(ctx, step == 0 ? ADASKIP_PHASE_PREFILL : ADASKIP_PHASE_DECODE) != ADASKIP_OK ||
                llama_decode(ctx, llama_batch_get_one(tokens, n_tokens)) != 0) {
            free(logits);
            return NULL;
        }
        memcpy(logits + (size_t) step * n_vocab, llama_get_logits_ith(ctx, -1), n_vocab * sizeof(float));
    }
    return logits;
}

// their FNV-1a checksum, and how the last of them begin
static void print(const char * name, const float * logits, int32_t n_vocab) {
    const unsigned char * bytes    = (const unsigned char *) logits;
    uint64_t              checksum = 14695981039346656037u;
    for (size_t i = 0; i < (1 + N_DECODE) * (size_t) n_vocab * sizeof(float); ++i) {
        checksum = (checksum ^ bytes[i]) * 1099511628211u;
    }
    printf("%-8s %016" PRIx64, name, checksum);
    for (int32_t i = 0; i < 4 && i < n_vocab; ++i) {
        printf(" %a", logits[(size_t) N_DECODE * n_vocab + i]);
    }
    printf("\n");
}

// skips the first attention and the first FFN from the middle up that can be skipped
static int set_plan(struct llama_context * ctx) {
    const int32_t             n_layer   = adaskip_n_layer(ctx);
    struct adaskip_sublayer * sublayers = calloc(2 * (size_t) n_layer, sizeof(struct adaskip_sublayer));
    uint8_t *                 skip      = calloc(2 * (size_t) n_layer, 1);
    float *                   scale     = calloc(2 * (size_t) n_layer, sizeof(float));
    int32_t                   res       = adaskip_sublayers(ctx, sublayers, 2 * n_layer);
    for (int32_t kind = 0; kind < 2; ++kind) {
        for (int32_t layer = n_layer / 2; layer < n_layer; ++layer) {
            if (sublayers[2 * layer + kind].skippable) {
                skip[2 * layer + kind] = 1;
                break;
            }
        }
    }
    for (int32_t i = 0; i < 2 * n_layer; ++i) {
        scale[i] = 1.5f;
    }
    struct adaskip_step step = { .start = 0, .set = { .n_layer = n_layer, .skip = skip, .scale = scale } };
    struct adaskip_plan plan = { .tag = 1, .prefill = &step.set, .decode = &step, .n_decode = 1 };
    if (res == ADASKIP_OK) {
        res = adaskip_set_plan(ctx, &plan);
    }
    free(sublayers);
    free(skip);
    free(scale);
    return res == ADASKIP_OK || fail("the plan is refused");
}

static int run(const char * path) {
    struct llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers              = 0;
    struct llama_model * model             = llama_model_load_from_file(path, model_params);
    if (!model) {
        return fail("the model cannot be opened");
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = 64;
    params.n_threads                   = 1;
    params.n_threads_batch             = 1;
    struct llama_context * ctx         = llama_init_from_model(model, params);
    if (!ctx) {
        return fail("the context cannot be made");
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const size_t  n_bytes = (1 + N_DECODE) * (size_t) n_vocab * sizeof(float);

    float * before  = evaluate(ctx, n_vocab);
    float * skipped = set_plan(ctx) ? evaluate(ctx, n_vocab) : NULL;
    float * behind  = adaskip_set_plan(ctx, NULL) == ADASKIP_OK ? evaluate(ctx, n_vocab) : NULL;

    int passed = before && skipped && behind;
    if (!passed) {
        fail("an evaluation failed");
    } else {
        print("without", before, n_vocab);
        print("skipped", skipped, n_vocab);
        print("behind", behind, n_vocab);
        if (memcmp(before, behind, n_bytes) != 0) {
            passed = fail("the logits behind a plan are not those before it");
        }
        if (memcmp(before, skipped, n_bytes) == 0) {
            passed = fail("the plan changes nothing");
        }
    }
    free(before);
    free(skipped);
    free(behind);
    llama_free(ctx);
    llama_model_free(model);
    return passed;
}

// what a file says wrongly of itself is an exception thrown through ggml's frames: the libraries must let it pass
static int refuse(const char * path) {
    struct llama_model *   model = llama_model_load_from_file(path, llama_model_default_params());
    struct llama_context * ctx   = model ? llama_init_from_model(model, llama_context_default_params()) : NULL;
    printf("refused  %s\n", path);
    return !ctx || fail("a broken file was opened");
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: native_smoke MODEL.gguf [BROKEN.gguf ...]\n");
        return 2;
    }
    llama_backend_init();
    int passed = run(argv[1]);
    for (int i = 2; i < argc; ++i) {
        passed = refuse(argv[i]) && passed;
    }
    llama_backend_free();
    return passed ? 0 : 1;
}
