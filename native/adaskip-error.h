#pragma once

#include "adaskip.h"

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

// ends a call with one of enum adaskip_error
struct adaskip_exception : std::runtime_error {
    adaskip_exception(int32_t code, const std::string & message) : std::runtime_error(message), code(code) {}

    int32_t code;
};

struct adaskip_failure {
    int32_t     code = ADASKIP_OK;
    std::string message;
};

// keeps what adaskip_last_error() tells this thread
void adaskip_set_last_error(std::string message);

// Runs f and tells what it threw, whatever that is: nothing may pass on into C. Where memory is out, there may be none
// for the message either; those written here are short enough to need none.
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
        // Nothing here throws what is no std::exception: this is one of another C++ runtime, that of a ggml which
        // another compiler built. On CPUs ggml throws where memory is out, and nowhere else.
        return { ADASKIP_ERROR_MEMORY, "error of ggml" };
    }
}
