// Preloaded into a process, this makes allocations of libllama, and buffers of ggml's backends, fail where it is told
// to.
//
// Counted are allocations of the thread that called failing_arm, until it calls failing_disarm: operator new and
// malloc by the library that the return address lies in, buffers where they are asked for. libstdc++ allocates for
// whoever calls it, strings above all, and counts as libllama; its other operators new call this one.

#include <dlfcn.h>
#include <link.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

extern "C" void * __libc_malloc(size_t);

// initial-exec, as the general model allocates on the first use in a thread
#define OF_THREAD static __thread __attribute__((tls_model("initial-exec")))

OF_THREAD bool    armed      = false;
OF_THREAD int64_t n_counted  = 0;
OF_THREAD int64_t n_failing  = 0;
OF_THREAD int32_t and_beyond = 0;

static bool fails() {
    ++n_counted;
    return n_counted == n_failing || (and_beyond && n_counted > n_failing);
}

// the path of the library that has some code
static const char * library_of(void * code) {
    dl_find_object found = {};
    return _dl_find_object(code, &found) == 0 ? found.dlfo_link_map->l_name : "";
}

static bool fails(void * caller) {
    const char * library = armed ? library_of(caller) : "";
    return (strstr(library, "/libllama") || strstr(library, "/libstdc++")) && fails();
}

#define CALLER __builtin_return_address(0)

extern "C" {

// lets the n-th allocation from now on fail, and with `beyond` all after it
void failing_arm(int64_t n, int32_t beyond) {
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
    return fails(CALLER) ? (errno = ENOMEM, nullptr) : __libc_malloc(n);
}

struct ggml_backend_buffer;
struct ggml_backend_buffer_type;

ggml_backend_buffer * ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type * buft, size_t size) {
    // libllama and ggml, which ask for them, find what is theirs beside or below them
    static void * const library = dlopen(library_of(CALLER), RTLD_NOLOAD | RTLD_LAZY);
    static const auto   real =
            (decltype(&ggml_backend_buft_alloc_buffer)) dlsym(library, "ggml_backend_buft_alloc_buffer");
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

void * operator new(size_t n) {
    void * p = fails(CALLER) ? nullptr : __libc_malloc(n ? n : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}
