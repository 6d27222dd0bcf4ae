#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

// std::regex of libstdc++ calls itself for each character that it matches, and llama.cpp has it match words of any
// length. So a long text is split on a thread with a stack of its own, and a word that is too long even for that is an
// exception: the iterators that std::regex reads by see where the stack ends. Others' std::regex keeps its own account.

// the last bytes of this thread's stack that may be used, null where nobody looks
extern thread_local const char * adaskip_stack_end;

[[noreturn]] void adaskip_stack_used();

// an iterator of random access over another
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

// splits pieces of a text, of these lengths, with enough stack for the longest
std::vector<size_t> adaskip_regex_split(
        const std::vector<size_t> & lengths, const std::function<std::vector<size_t>()> & split);

// Splits a text into tokens. INT32_MIN for what is thrown meanwhile, or asserted; adaskip_last_error() then tells it.
int32_t adaskip_tokenize(const std::function<int32_t()> & tokenize);
