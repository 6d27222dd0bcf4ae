// Preloaded into a process, this makes what is written into a folder fail where it is told to.
//
// Counted, in all threads, is what changes files in the folder or makes them last: to create, write, truncate, sync,
// close, rename and unlink. The n-th of them fails as on a full disk, alone or with all that need space after it, or
// the process is killed there. A write that fails, or is killed, has written half of its bytes.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

enum answer {
    GOES_ON,
    FAILS,
    ENDS, // after half of it, where it has halves
};

static answer ask(bool needs_space) {
    const int64_t n = ++n_counted;
    if (n == n_failing) {
        return mode == KILLED ? ENDS : FAILS;
    }
    return mode == FULL && needs_space && n > n_failing ? FAILS : GOES_ON;
}

static void kill_here() {
    kill(getpid(), SIGKILL);
    for (;;) {
        pause();
    }
}

// for what has no halves
static bool fails(bool needs_space) {
    const answer answer = ask(needs_space);
    if (answer == ENDS) {
        kill_here();
    }
    errno = answer == FAILS ? ENOSPC : errno;
    return answer == FAILS;
}

#define REAL(name) static const auto real = (decltype(&name)) dlsym(RTLD_NEXT, #name)

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
    if (!is_inside(fd)) {
        return real(fd, data, n);
    }
    const answer answer = ask(true);
    if (answer == GOES_ON) {
        return real(fd, data, n);
    }
    const ssize_t half = n > 1 ? real(fd, data, n / 2) : 0;
    if (answer == ENDS) {
        kill_here();
    }
    // what is left of the write fails then, as the disk is full
    errno = ENOSPC;
    return mode == FULL && half > 0 ? half : -1;
}

ssize_t writev(int fd, const iovec * parts, int n_parts) {
    REAL(writev);
    return is_inside(fd) && fails(true) ? -1 : real(fd, parts, n_parts);
}

ssize_t pwrite64(int fd, const void * data, size_t n, off64_t at) {
    REAL(pwrite64);
    return is_inside(fd) && fails(true) ? -1 : real(fd, data, n, at);
}

size_t fwrite(const void * data, size_t size, size_t n, FILE * file) {
    REAL(fwrite);
    return is_inside(fileno(file)) && fails(true) ? 0 : real(data, size, n, file);
}

int fsync(int fd) {
    REAL(fsync);
    return is_inside(fd) && fails(true) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    return is_inside(fd) && fails(false) ? -1 : real(fd, n);
}

int close(int fd) {
    REAL(close);
    const bool is_ours = is_inside(fd) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
    const bool failed  = is_ours && fails(false);
    const int  res     = real(fd);
    errno              = failed ? ENOSPC : errno;
    return failed ? -1 : res;
}

int rename(const char * from, const char * to) {
    REAL(rename);
    return is_inside(to) && fails(true) ? -1 : real(from, to);
}

int unlink(const char * path) {
    REAL(unlink);
    return is_inside(path) && fails(false) ? -1 : real(path);
}

int mkdir(const char * path, mode_t rights) {
    REAL(mkdir);
    return is_inside(path) && fails(true) ? -1 : real(path, rights);
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

int     open(const char * path, int flags, ...) __attribute__((alias("open64")));
int     ftruncate(int fd, off_t n) __attribute__((alias("ftruncate64")));
ssize_t pwrite(int fd, const void * data, size_t n, off_t at) __attribute__((alias("pwrite64")));

} // extern "C"
