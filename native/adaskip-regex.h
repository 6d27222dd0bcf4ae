#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

// Splits long texts for llama.cpp with enough stack. libstdc++'s std::regex recurses for each character, and llama.cpp
// matches words of any length. So a long text is split on a thread with a larger stack. If a word is too long even for
// that, the iterators through which std::regex reads the text throw. Other std::regex have a limit of their own.

// the lowest address of this thread's stack that may be used, null for no check
extern thread_local const char * adaskip_stack_end;

[[noreturn]] void adaskip_stack_used();

// a random access iterator over another one, which checks the stack
template <typename It> class adaskip_regex_iterator {
public:
    using iterator_category = std::random_access_iterator_tag;
    using value_type        = typename std::iterator_traits<It>::value_type;
    using difference_type   = typename std::iterator_traits<It>::difference_type;
    using pointer           = typename std::iterator_traits<It>::pointer;
    using reference         = typename std::iterator_traits<It>::reference;

    adaskip_regex_iterator() = default;
    adaskip_regex_iterator(It at) : at(at), end(adaskip_stack_end) {}

    reference operator*() const {
#if defined(__GNUC__)
        if (static_cast<const char *>(__builtin_frame_address(0)) < end) {
            adaskip_stack_used();
        }
#endif
        return *at;
    }

    pointer   operator->() const { return &**this; }
    reference operator[](difference_type n) const { return *(*this + n); }

    adaskip_regex_iterator & operator++() { return *this += 1; }
    adaskip_regex_iterator & operator--() { return *this -= 1; }
    adaskip_regex_iterator & operator+=(difference_type n) {
        at += n;
        return *this;
    }
    adaskip_regex_iterator & operator-=(difference_type n) { return *this += -n; }

    adaskip_regex_iterator operator++(int) {
        auto before = *this;
        ++*this;
        return before;
    }
    adaskip_regex_iterator operator--(int) {
        auto before = *this;
        --*this;
        return before;
    }

    friend adaskip_regex_iterator operator+(adaskip_regex_iterator it, difference_type n) { return it += n; }
    friend adaskip_regex_iterator operator+(difference_type n, adaskip_regex_iterator it) { return it += n; }
    friend adaskip_regex_iterator operator-(adaskip_regex_iterator it, difference_type n) { return it -= n; }

    friend difference_type operator-(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) {
        return a.at - b.at;
    }
    friend bool operator==(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at == b.at; }
    friend bool operator!=(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at != b.at; }
    friend bool operator<(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at < b.at; }
    friend bool operator>(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at > b.at; }
    friend bool operator<=(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at <= b.at; }
    friend bool operator>=(const adaskip_regex_iterator & a, const adaskip_regex_iterator & b) { return a.at >= b.at; }

private:
    It           at{};
    const char * end = nullptr;
};

// calls split, with enough stack for the longest of the pieces of a text, of these lengths in characters
std::vector<size_t> adaskip_regex_split(
        const std::vector<size_t> & lengths, const std::function<std::vector<size_t>()> & split);

// calls tokenize; INT32_MIN for an exception or a failed assertion, and adaskip_last_error() has its message
int32_t adaskip_tokenize(const std::function<int32_t()> & tokenize);
