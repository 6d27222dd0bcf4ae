#pragma once

struct llama_hparams;

// While one lives, what ggml would end the process for on this thread is a std::runtime_error. llama.cpp asserts much
// of what a GGUF file says about itself, and a file or a setting shall not end the process.
//
// Not for around a computation, whose other threads would wait for this one for ever.
class adaskip_abort_guard {
public:
    adaskip_abort_guard();
    ~adaskip_abort_guard();

    adaskip_abort_guard(const adaskip_abort_guard &)             = delete;
    adaskip_abort_guard & operator=(const adaskip_abort_guard &) = delete;
};

// throws for what is asserted in a computation alone
void adaskip_check_hparams(const llama_hparams & hparams);
