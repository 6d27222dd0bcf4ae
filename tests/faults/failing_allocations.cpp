// Preloaded into a process, this makes allocations of libllama, or of ggml, fail where it is told to.
//
// Counted are allocations of the thread that called failing_arm, until it calls failing_disarm, and by who makes them:
// operator new and the malloc family by the library that the return address lies in, buffers of ggml's backends where
// ggml asks for them. libstdc++ allocates for whoever calls it, strings above all, and counts as libllama.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <dlfcn.h>
#include <link.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
void * __libc_malloc(size_t);
void * __libc_calloc(size_t, size_t);
void * __libc_realloc(void *, size_t);
void * __libc_memalign(size_t, size_t);
}

enum who : int32_t {
    LLAMA   = 1,
    BUFFERS = 2,
    GGML    = 4,
};

struct code_range {
    uintptr_t begin;
    uintptr_t end;
    int32_t   who;
};

static code_range ranges[64];
static int        n_ranges  = 0;
static void *     ggml_base = nullptr;

// initial-exec, as the general model allocates on the first use in a thread
#define OF_THREAD static __thread __attribute__((tls_model("initial-exec")))

OF_THREAD int32_t armed      = 0; // who is counted, 0 for nobody
OF_THREAD int64_t n_counted  = 0;
OF_THREAD int64_t n_failing  = 0;
OF_THREAD int32_t and_beyond = 0;

static int find_code(dl_phdr_info * info, size_t, void *) {
    const char * name = strrchr(info->dlpi_name, '/');
    name              = name ? name + 1 : info->dlpi_name;
    int32_t who       = 0;
    if (strncmp(name, "libllama", 8) == 0 || strncmp(name, "libstdc++", 9) == 0) {
        who = LLAMA;
    } else if (strncmp(name, "libggml", 7) == 0) {
        who = GGML;
    }
    if (strncmp(name, "libggml-base", 12) == 0 && !ggml_base) {
        ggml_base = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
    }
    for (int i = 0; who != 0 && i < info->dlpi_phnum; ++i) {
        const auto & header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && (header.p_flags & PF_X) && n_ranges < 64) {
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            ranges[n_ranges++]    = { begin, begin + header.p_memsz, who };
        }
    }
    return 0;
}

static bool fails(int32_t who) {
    if (!(armed & who)) {
        return false;
    }
    ++n_counted;
    return n_counted == n_failing || (and_beyond && n_counted > n_failing);
}

static bool fails(const void * caller) {
    if (armed == 0) {
        return false;
    }
    for (int i = 0; i < n_ranges; ++i) {
        if (ranges[i].begin <= (uintptr_t) caller && (uintptr_t) caller < ranges[i].end) {
            return fails(ranges[i].who);
        }
    }
    return false;
}

#define FAILS fails(__builtin_return_address(0))

extern "C" {

// lets the n-th allocation from now on fail, and with `beyond` all after it; n = 0 counts alone
void failing_arm(int32_t who, int64_t n, int32_t beyond) {
    if (n_ranges == 0) {
        dl_iterate_phdr(find_code, nullptr);
    }
    n_counted  = 0;
    n_failing  = n > 0 ? n : INT64_MAX;
    and_beyond = beyond;
    armed      = who;
}

int64_t failing_disarm(void) {
    armed = 0;
    return n_counted;
}

void * malloc(size_t n) {
    return FAILS ? (errno = ENOMEM, nullptr) : __libc_malloc(n);
}

void * calloc(size_t n, size_t size) {
    return FAILS ? (errno = ENOMEM, nullptr) : __libc_calloc(n, size);
}

void * realloc(void * p, size_t n) {
    return FAILS ? (errno = ENOMEM, nullptr) : __libc_realloc(p, n);
}

int posix_memalign(void ** p, size_t alignment, size_t n) {
    if (FAILS) {
        return ENOMEM;
    }
    *p = __libc_memalign(alignment, n);
    return *p ? 0 : ENOMEM;
}

void * aligned_alloc(size_t alignment, size_t n) {
    return FAILS ? (errno = ENOMEM, nullptr) : __libc_memalign(alignment, n);
}

struct ggml_backend_buffer;
struct ggml_backend_buffer_type;

ggml_backend_buffer * ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type * buft, size_t size) {
    using function = ggml_backend_buffer * (*)(ggml_backend_buffer_type *, size_t);
    if (!ggml_base) {
        dl_iterate_phdr(find_code, nullptr);
    }
    static const auto real = (function) dlsym(ggml_base, "ggml_backend_buft_alloc_buffer");
    // of no size ggml takes no memory for them: llama.cpp asks with such which type of buffer serves
    if (size > 0 && fails(BUFFERS)) {
        return nullptr;
    }
    const int32_t before = armed;
    armed                = before & ~(BUFFERS | GGML); // what is inside is this one allocation
    auto * res           = real(buft, size);
    armed                = before;
    return res;
}

} // extern "C"

static void * allocate(const void * caller, size_t n, size_t alignment) {
    void * p = fails(caller) ? nullptr : alignment ? __libc_memalign(alignment, n) : __libc_malloc(n ? n : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}

#define CALLER __builtin_return_address(0)

void * operator new(size_t n) {
    return allocate(CALLER, n, 0);
}

void * operator new[](size_t n) {
    return allocate(CALLER, n, 0);
}

void * operator new(size_t n, std::align_val_t alignment) {
    return allocate(CALLER, n, (size_t) alignment);
}

void * operator new[](size_t n, std::align_val_t alignment) {
    return allocate(CALLER, n, (size_t) alignment);
}

void * operator new(size_t n, const std::nothrow_t &) noexcept {
    return fails(CALLER) ? nullptr : __libc_malloc(n ? n : 1);
}

void * operator new[](size_t n, const std::nothrow_t &) noexcept {
    return fails(CALLER) ? nullptr : __libc_malloc(n ? n : 1);
}
