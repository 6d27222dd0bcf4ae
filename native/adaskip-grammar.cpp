#include "adaskip-grammar.h"

#include "adaskip-abort.h"
#include "adaskip-error.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>
#include <string>

// Nanoseconds: each step counts as its time on an AMD EPYC, or more for its memory. Refused grammars used at most
// 400 MB.
static constexpr size_t MOST_WORK = 1'000'000'000;

static constexpr size_t MOST_STACKS = 10'000; // each new one is compared with all others

static constexpr const char * TOO_MANY = "the grammar can go on in too many ways";

// Nested parentheses, and chains of rules that begin with the next one. A level of llama_grammar_parser takes 500 bytes
// of stack, and threads with 1 MB are common.
static constexpr size_t MOST_LEVELS = 1000;

// Work counts while this library reads a grammar or samples a token. Elsewhere, as in llama_sampler_apply, an exception
// would end the process.
static thread_local bool        counts   = false;
static thread_local size_t      work     = 0;
static thread_local size_t      n_levels = 0;
static thread_local std::string reason;

static void refuse(const char * message) {
    throw adaskip_exception(ADASKIP_ERROR_SAMPLER, message);
}

struct counting {
    counting() {
        counts = true;
        work   = 0;
    }

    ~counting() { counts = false; }
};

static void spend(size_t n) {
    if (counts && n > MOST_WORK - work) {
        refuse(TOO_MANY);
    }
    work += counts ? n : 0;
}

void adaskip_grammar_name(const std::string & base_name) {
    spend(200 + 4 * base_name.size());
}

void adaskip_grammar_repeat(const llama_grammar_rule & repeated, uint64_t min_times, uint64_t max_times) {
    if (counts && max_times < min_times) {
        refuse("the grammar has a repetition with a maximum below its minimum");
    }
    const uint64_t n_times = max_times == UINT64_MAX ? min_times + 1 : max_times;
    spend(64 * n_times * (1 + repeated.size())); // more than its time, because of its memory
}

void adaskip_grammar_visit(const llama_grammar_rule & rule) {
    spend(50 + rule.size());
}

void adaskip_grammar_advance(
        const llama_grammar_rules & rules, const llama_grammar_stack & stack, const llama_grammar_stacks & others) {
    const auto & top = *stack.back();
    spend(150 + stack.size());
    if (top.type != LLAMA_GRETYPE_RULE_REF) {
        adaskip_grammar_find(others);
        return;
    }
    const auto & rule   = rules[top.value];
    const size_t n_alts = 1 + std::count_if(rule.begin(), rule.end(), [](const llama_grammar_element & element) {
        return element.type == LLAMA_GRETYPE_ALT;
    });
    spend(rule.size() + n_alts * (50 + stack.size()));
}

void adaskip_grammar_match(const llama_grammar_stack & stack, size_t n_tokens) {
    size_t width = 5;
    if (!stack.empty()) { // counts the characters of a class
        const auto * next = stack.back() + 1;
        while (next->type == LLAMA_GRETYPE_CHAR_ALT || next->type == LLAMA_GRETYPE_CHAR_RNG_UPPER) {
            ++next;
            ++width;
        }
    }
    spend(width * (1 + n_tokens));
}

void adaskip_grammar_find(const llama_grammar_stacks & others) {
    if (counts && others.size() > MOST_STACKS) {
        refuse(TOO_MANY);
    }
    spend(1 + others.size());
}

adaskip_grammar_level::adaskip_grammar_level() {
    if (counts && n_levels >= MOST_LEVELS) {
        refuse("the grammar has too many nested parentheses, or too long a chain of rules");
    }
    ++n_levels;
}

adaskip_grammar_level::~adaskip_grammar_level() {
    --n_levels;
}

void adaskip_grammar_check(const llama_token_data_array & tokens) {
    for (size_t i = 0; i < tokens.size; ++i) {
        if (!counts || tokens.data[i].logit > -INFINITY) {
            return;
        }
    }
    refuse("the grammar allows no token here");
}

llama_grammar * adaskip_grammar_read(const std::function<llama_grammar *()> & read) {
    const counting scope;
    reason.clear();
    llama_grammar * grammar = nullptr;
    const auto      failure = adaskip_try([&] {
        const adaskip_abort_guard guard;
        grammar = read();
    });
    if (failure.code != ADASKIP_OK) {
        adaskip_grammar_refused(failure.message.c_str());
    }
    return grammar;
}

void adaskip_grammar_refused(const char * message) {
    reason = message;
}

const char * adaskip_grammar_reason() {
    return reason.empty() ? "a rule begins with itself, or no rule is named root" : reason.c_str();
}

llama_token adaskip_sample(llama_context * ctx, const std::function<llama_token()> & sample) {
    const counting scope;
    return ctx->adaskip.guard([&] {
        const adaskip_abort_guard guard;
        try {
            return sample();
        } catch (const adaskip_exception &) {
            throw;
        } catch (const std::runtime_error & e) {
            throw adaskip_exception(ADASKIP_ERROR_SAMPLER, e.what());
        }
    });
}
