#pragma once

struct llama_hparams;

// While a guard lives, an abort of ggml on this thread throws a std::runtime_error instead of ending the process.
// llama.cpp asserts much of a GGUF file's content, so a bad file would end the process.
//
// Not for use around a computation: its other threads would wait for this one for ever.
class adaskip_abort_guard {
public:
    adaskip_abort_guard();
    ~adaskip_abort_guard();

    adaskip_abort_guard(const adaskip_abort_guard &)             = delete;
    adaskip_abort_guard & operator=(const adaskip_abort_guard &) = delete;
};

// throws if a value would fail an assertion inside a computation
void adaskip_check_hparams(const llama_hparams & hparams);
