// Preloaded into a process, this makes what is written into a folder fail where it is told to.
//
// Counted, in all threads, is what changes files in the folder or makes them last: to create, write, truncate, sync,
// close, rename and unlink. The n-th of them fails as on a full disk, alone or with all that need space after it, or
// the process is killed there. A write that fails, or is killed, has written half of its bytes.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

enum mode : int32_t {
    OFF,
    ONCE,   // the n-th fails
    FULL,   // so does all after it that needs space
    KILLED, // the process ends there
};

static char                 folder[PATH_MAX] = "";
static size_t               n_folder         = 0;
static std::atomic<int32_t> mode{ OFF };
static std::atomic<int64_t> n_counted{ 0 };
static int64_t              n_failing = 0;

static bool is_inside(const char * path) {
    return mode != OFF && n_folder > 0 && path && strncmp(path, folder, n_folder) == 0;
}

static bool is_inside(int fd) {
    if (mode == OFF) {
        return false;
    }
    char name[32], path[PATH_MAX];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    const ssize_t n     = readlink(name, path, sizeof(path) - 1);
    path[n > 0 ? n : 0] = 0;
    return is_inside((const char *) path);
}

// counts a call; whether it is to fail
static bool is_hit(bool needs_space) {
    const int64_t n = ++n_counted;
    return n == n_failing || (mode == FULL && needs_space && n > n_failing);
}

static bool fail() {
    if (mode == KILLED) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = ENOSPC;
    return true;
}

static bool fails(bool needs_space) {
    return is_hit(needs_space) && fail();
}

#define REAL(name) static const auto real = (decltype(&name)) dlsym(RTLD_NEXT, #name)

// a function that fails where a condition holds
#define FAILING(type, name, parameters, arguments, condition)                                                          \
    type name parameters {                                                                                             \
        REAL(name);                                                                                                    \
        return (condition) ? -1 : real arguments;                                                                      \
    }

extern "C" {

// begins to count; the n-th is to fail
void failing_arm(const char * path, int32_t how, int64_t n) {
    n_folder = strlen(path);
    memcpy(folder, path, n_folder + 1);
    n_counted = 0;
    n_failing = n;
    mode      = how;
}

int64_t failing_disarm(void) {
    mode = OFF;
    return n_counted;
}

ssize_t write(int fd, const void * data, size_t n) {
    REAL(write);
    if (!is_inside(fd) || !is_hit(true)) {
        return real(fd, data, n);
    }
    const ssize_t half = real(fd, data, n / 2);
    fail();
    // what is left of the write fails then, as the disk is full
    return mode == FULL && half > 0 ? half : -1;
}

FAILING(int, fsync, (int fd), (fd), is_inside(fd) && fails(true))
FAILING(int, ftruncate64, (int fd, off64_t n), (fd, n), is_inside(fd) && fails(false))
FAILING(int, rename, (const char * from, const char * to), (from, to), is_inside(to) && fails(true))
FAILING(int, unlink, (const char * path), (path), is_inside(path) && fails(false))
FAILING(int, mkdir, (const char * path, mode_t rights), (path, rights), is_inside(path) && fails(true))

int close(int fd) {
    REAL(close);
    const bool is_ours = is_inside(fd) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
    const bool failed  = is_ours && fails(false);
    const int  res     = real(fd);
    errno              = failed ? ENOSPC : errno;
    return failed ? -1 : res;
}

int open64(const char * path, int flags, ...) {
    REAL(open64);
    va_list arguments;
    va_start(arguments, flags);
    const mode_t rights = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    if (flags & O_CREAT && is_inside(path) && access(path, F_OK) != 0 && fails(true)) {
        return -1;
    }
    return real(path, flags, rights);
}

int open(const char * path, int flags, ...) __attribute__((alias("open64")));
int ftruncate(int fd, off_t n) __attribute__((alias("ftruncate64")));

} // extern "C"
