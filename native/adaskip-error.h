#pragma once

#include "adaskip.h"

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

// ends a call with a code of enum adaskip_error
struct adaskip_exception : std::runtime_error {
    adaskip_exception(int32_t code, const std::string & message) : std::runtime_error(message), code(code) {}

    int32_t code;
};

struct adaskip_failure {
    int32_t     code = ADASKIP_OK;
    std::string message;
};

// sets the message of adaskip_last_error() for this thread
void adaskip_set_last_error(std::string message);

// Runs f and returns any exception as a failure, because none may pass into C. Without memory, a message could not be
// allocated. The ones here are short enough to need no allocation.
template <typename F> adaskip_failure adaskip_try(F && f) {
    try {
        try {
            f();
            return {};
        } catch (const adaskip_exception & e) {
            return { e.code, e.what() };
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & e) {
            return { ADASKIP_ERROR_INTERNAL, e.what() };
        }
    } catch (const std::bad_alloc &) {
        return { ADASKIP_ERROR_MEMORY, "out of memory" };
    } catch (...) {
        // Not a std::exception: it comes from another C++ runtime, in a ggml of another compiler. On CPUs, ggml throws
        // only without memory.
        return { ADASKIP_ERROR_MEMORY, "error of ggml" };
    }
}
