#include "adaskip-regex.h"

#include "adaskip-abort.h"
#include "adaskip-error.h"

#include <algorithm>
#include <exception>
#include <stdexcept>

#ifndef _WIN32
#include <pthread.h>
#endif

thread_local const char * adaskip_stack_end = nullptr;

void adaskip_stack_used() {
    throw std::length_error("a word of it is too long");
}

#ifdef _WIN32

// No std::regex on Windows recurses for a character.
std::vector<size_t> adaskip_regex_split(
        const std::vector<size_t> & lengths, const std::function<std::vector<size_t>()> & split) {
    (void) lengths;
    return split();
}

#else

// Sizes of a thread's stack in bytes. Only the used part takes memory.
static constexpr size_t MOST_CHARS = 1000;    // characters that the caller's own stack has room for
static constexpr size_t PER_CHAR   = 1 << 10; // 150 to 550 were used
static constexpr size_t MOST_STACK = 1 << 28;
static constexpr size_t RESERVE    = 1 << 18; // for calls between two characters

namespace {

struct work {
    const std::function<std::vector<size_t>()> & split;
    size_t                                       n_stack;

    std::vector<size_t> res;
    std::exception_ptr  thrown;
};

} // namespace

static void * run(void * arg) {
    auto & w = *static_cast<work *>(arg);

    adaskip_stack_end = static_cast<const char *>(__builtin_frame_address(0)) - (w.n_stack - RESERVE);
    try {
        w.res = w.split();
    } catch (...) {
        w.thrown = std::current_exception();
    }
    return nullptr;
}

std::vector<size_t> adaskip_regex_split(
        const std::vector<size_t> & lengths, const std::function<std::vector<size_t>()> & split) {
    const auto longest = std::max_element(lengths.begin(), lengths.end());
    if (longest == lengths.end() || *longest <= MOST_CHARS) {
        return split();
    }
    const size_t n_stack = std::min(*longest * PER_CHAR, MOST_STACK) + 3 * RESERVE;

    work w = { split, n_stack - n_stack % RESERVE, {}, {} }; // macOS accepts only whole pages

    pthread_t      thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    const int err = pthread_attr_setstacksize(&attr, w.n_stack) || pthread_create(&thread, &attr, run, &w);
    pthread_attr_destroy(&attr);
    if (err) {
        throw std::bad_alloc();
    }
    pthread_join(thread, nullptr);
    if (w.thrown) {
        std::rethrow_exception(w.thrown);
    }
    return std::move(w.res);
}

#endif

int32_t adaskip_tokenize(const std::function<int32_t()> & tokenize) {
    int32_t    n       = INT32_MIN;
    const auto failure = adaskip_try([&] {
        const adaskip_abort_guard guard;
        n = tokenize();
    });
    adaskip_set_last_error(failure.message);
    return n;
}
