#pragma once

#include "llama-grammar.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct llama_context;

// Bounds llama.cpp's work for a grammar: it follows every possible continuation of a text, and their number may double
// with each character. The functions below count work, for reading a grammar and for each sampled token. They throw if
// it is too much.

// reading a grammar: a rule gets a name, an element is repeated (max_times is UINT64_MAX for no bound), and a rule is
// searched for left recursion
void adaskip_grammar_name(const std::string & base_name);
void adaskip_grammar_repeat(const llama_grammar_rule & repeated, uint64_t min_times, uint64_t max_times);
void adaskip_grammar_visit(const llama_grammar_rule & rule);

// sampling a token: a stack advances to others, tokens are compared with the top of a stack, and a stack is searched
// among others
void adaskip_grammar_advance(
        const llama_grammar_rules & rules, const llama_grammar_stack & stack, const llama_grammar_stacks & others);
void adaskip_grammar_match(const llama_grammar_stack & stack, size_t n_tokens);
void adaskip_grammar_find(const llama_grammar_stacks & others);

// one level of a recursion; throws if there are too many for a thread's stack
class adaskip_grammar_level {
public:
    adaskip_grammar_level();
    ~adaskip_grammar_level();

    adaskip_grammar_level(const adaskip_grammar_level &)             = delete;
    adaskip_grammar_level & operator=(const adaskip_grammar_level &) = delete;
};

// throws if the grammar allows none of the tokens
void adaskip_grammar_check(const llama_token_data_array & tokens);

// Reads a grammar; null if it cannot be used. The reason may contain a client's whole grammar. So it is not logged, but
// kept for adaskip_grammar_reason().
llama_grammar * adaskip_grammar_read(const std::function<llama_grammar *()> & read);
void            adaskip_grammar_refused(const char * reason);
const char *    adaskip_grammar_reason();

// Samples a token. After an exception or a failed assertion the token is negative, and the context has the failure.
llama_token adaskip_sample(llama_context * ctx, const std::function<llama_token()> & sample);
