#pragma once

#include "llama-grammar.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct llama_context;

// llama.cpp follows every way in which a text can go on by a grammar, and their number may double with each character.
// So what is done for a grammar is counted, and ends by an exception where it is too much: of a grammar that is read,
// and of each token that is sampled by it.

// of a grammar that is read: a rule gets a name, something in it is repeated (at most UINT64_MAX times for no bound),
// and rules are searched for those that begin with themselves
void adaskip_grammar_name(const std::string & base_name);
void adaskip_grammar_repeat(const llama_grammar_rule & repeated, uint64_t min_times, uint64_t max_times);
void adaskip_grammar_visit(const llama_grammar_rule & rule);

// of a token: a stack becomes others, tokens are held against the top of a stack, and a stack is looked for among
// others
void adaskip_grammar_advance(
        const llama_grammar_rules & rules, const llama_grammar_stack & stack, const llama_grammar_stacks & others);
void adaskip_grammar_match(const llama_grammar_stack & stack, size_t n_tokens);
void adaskip_grammar_find(const llama_grammar_stacks & others);

// one level of a recursion; throws where there are too many for a thread's stack
class adaskip_grammar_level {
public:
    adaskip_grammar_level();
    ~adaskip_grammar_level();

    adaskip_grammar_level(const adaskip_grammar_level &)             = delete;
    adaskip_grammar_level & operator=(const adaskip_grammar_level &) = delete;
};

// throws where no token is left
void adaskip_grammar_check(const llama_token_data_array & tokens);

// Reads a grammar; null where it cannot be used. Why is not logged, as it may hold all of the grammar, but kept for
// adaskip_grammar_reason().
llama_grammar * adaskip_grammar_read(const std::function<llama_grammar *()> & read);
void            adaskip_grammar_refused(const char * reason);
const char *    adaskip_grammar_reason();

// Samples a token; what is thrown meanwhile, or asserted, is a failure of the context, and the token negative.
llama_token adaskip_sample(llama_context * ctx, const std::function<llama_token()> & sample);
