// Preloaded into a process, this makes allocations of libllama, and buffers of ggml's backends, fail where it is told to.
//
// Counted are allocations of the thread that called failing_arm, until it calls failing_disarm: operator new and the
// malloc family by the library that the return address lies in, buffers where they are asked for. libstdc++ allocates
// for whoever calls it, strings above all, and counts as libllama.

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

struct code_range {
    uintptr_t begin;
    uintptr_t end;
};

static code_range ranges[64];
static int        n_ranges  = 0;
static void *     ggml_base = nullptr;

// initial-exec, as the general model allocates on the first use in a thread
#define OF_THREAD static __thread __attribute__((tls_model("initial-exec")))

OF_THREAD bool    armed      = false;
OF_THREAD int64_t n_counted  = 0;
OF_THREAD int64_t n_failing  = 0;
OF_THREAD int32_t and_beyond = 0;

static int find_code(dl_phdr_info * info, size_t, void *) {
    const char * name = strrchr(info->dlpi_name, '/');
    name              = name ? name + 1 : info->dlpi_name;
    const bool counts = strncmp(name, "libllama", 8) == 0 || strncmp(name, "libstdc++", 9) == 0;
    if (strncmp(name, "libggml-base", 12) == 0 && !ggml_base) {
        ggml_base = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
    }
    for (int i = 0; counts && i < info->dlpi_phnum; ++i) {
        const auto & header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && (header.p_flags & PF_X) && n_ranges < 64) {
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            ranges[n_ranges++]    = { begin, begin + header.p_memsz };
        }
    }
    return 0;
}

static bool fails() {
    ++n_counted;
    return n_counted == n_failing || (and_beyond && n_counted > n_failing);
}

static bool fails(const void * caller) {
    for (int i = 0; armed && i < n_ranges; ++i) {
        if (ranges[i].begin <= (uintptr_t) caller && (uintptr_t) caller < ranges[i].end) {
            return fails();
        }
    }
    return false;
}

#define FAILS fails(__builtin_return_address(0))

extern "C" {

// lets the n-th allocation from now on fail, and with `beyond` all after it
void failing_arm(int64_t n, int32_t beyond) {
    if (n_ranges == 0) {
        dl_iterate_phdr(find_code, nullptr);
    }
    n_counted  = 0;
    n_failing  = n;
    and_beyond = beyond;
    armed      = true;
}

int64_t failing_disarm(void) {
    armed = false;
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
    if (size > 0 && armed && fails()) {
        return nullptr;
    }
    const bool before = armed;
    armed             = false; // what is inside is this one allocation
    auto * res        = real(buft, size);
    armed             = before;
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
