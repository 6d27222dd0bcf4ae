#include "adaskip-abort.h"

#include "llama-hparams.h"

#include "ggml.h"

#include <cstdio>
#include <mutex>
#include <stdexcept>

static thread_local int n_guards_here = 0;

// ggml has one callback for all threads, and prints a backtrace if it has none
static std::mutex            mutex;
static int                   n_guards = 0;
static ggml_abort_callback_t before   = nullptr;

static void throw_or_pass_on(const char * message) {
    if (n_guards_here > 0) {
        throw std::runtime_error(message);
    }
    if (before) {
        before(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

adaskip_abort_guard::adaskip_abort_guard() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (n_guards++ == 0) {
        before = ggml_set_abort_callback(throw_or_pass_on);
    }
    ++n_guards_here;
}

adaskip_abort_guard::~adaskip_abort_guard() {
    const std::lock_guard<std::mutex> lock(mutex);
    --n_guards_here;
    if (--n_guards == 0) {
        ggml_set_abort_callback(before);
    }
}

void adaskip_check_hparams(const llama_hparams & hparams) {
    for (const float eps : { hparams.f_norm_eps, hparams.f_norm_rms_eps, hparams.f_norm_group_eps }) {
        if (!(eps >= 0.0f)) {
            throw std::runtime_error("the epsilon of a norm is negative or not a number");
        }
    }
}
