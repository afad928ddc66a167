/* Interposes the calls by which a process changes files, and makes one of them fail, or end or stop the process.

   Loaded with LD_PRELOAD, so that native writers (SQLite, safetensors, torch) meet the fault as Python does.
   It does nothing before faults_arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define ALIAS(name) __attribute__((alias(#name), visibility("default")))

enum action { LIST, FAIL = 1, LAST, STOP, JUMP };
enum kind { WRITE = 1, SYNC = 2, RENAME = 4, CREATE = 8, REMOVE = 16 };

struct shared {
    atomic_long calls;  /* that fit the folder and the kinds */
    atomic_long fired;
    char at[PATH_MAX + 32]; /* the first call at which it fired */
};
static struct shared *shared; /* in a file, which outlives a killed process */
static struct {
    char folder[PATH_MAX];
    size_t length;
    int kinds, action, number;
    long when, lasting, seconds;
} fault;
static atomic_int shifted;
static int listing = -1; /* gets a line for each call, if no fault is chosen */

/* Act at the when-th call of these kinds on a path in this folder: FAIL it with errno number (and as many later
   ones as lasting says), end or stop the process before it, or move the clock by this number of seconds from then on. */
void faults_arm(const char *counts, const char *folder, int kinds, int action, long when, int number, long lasting,
                long seconds) {
    int file = open(counts, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof *shared) < 0) abort();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED) abort();
    close(file);
    if (action == LIST) {
        char name[PATH_MAX];
        snprintf(name, sizeof name, "%s.calls", counts);
        listing = open(name, O_WRONLY | O_CREAT | O_APPEND, 0600);
    }
    strncpy(fault.folder, folder, sizeof fault.folder - 1);
    fault.length = strlen(fault.folder);
    fault.action = action;
    fault.when = when;
    fault.number = number;
    fault.lasting = lasting;
    fault.seconds = seconds;
    fault.kinds = kinds;
}

static int within(const char *path) {
    return strncmp(path, fault.folder, fault.length) == 0 && (path[fault.length] == '/' || path[fault.length] == 0);
}

/* Return 1 if this call must fail; errno is set. */
static int strikes(int kind, const char *name, const char *path) {
    if (!(fault.kinds & kind) || !within(path)) return 0;
    long call = atomic_fetch_add(&shared->calls, 1) + 1;
    if (listing >= 0) {
        char line[PATH_MAX + 32];
        int length = snprintf(line, sizeof line, "%s %s\n", name, path);
        syscall(SYS_write, listing, line, length);
    }
    if (fault.action == LIST || call < fault.when || call > fault.when + (fault.action == FAIL ? fault.lasting : 0)) return 0;
    if (atomic_fetch_add(&shared->fired, 1) == 0) snprintf(shared->at, sizeof shared->at, "%s %s", name, path);
    if (fault.action == LAST) syscall(SYS_kill, getpid(), SIGKILL);
    if (fault.action == STOP) syscall(SYS_kill, getpid(), SIGSTOP);
    if (fault.action == JUMP) shifted = 1;
    if (fault.action != FAIL) return 0;
    errno = fault.number;
    return 1;
}

static int strikes_file(int kind, const char *name, int file) {
    if (!(fault.kinds & kind)) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return strikes(kind, name, path);
}

static int strikes_path(int kind, const char *name, int folder, const char *path) {
    if (!(fault.kinds & kind) || path == NULL) return 0;
    char whole[2 * PATH_MAX];
    if (path[0] == '/') return strikes(kind, name, path);
    char link[64];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    int before = errno;
    ssize_t length = readlink(link, whole, PATH_MAX - 1);
    errno = before;
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return strikes(kind, name, whole);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (real == NULL) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* Writes. Half of the bytes are written before one fails, as on a disk that fills up. */
ssize_t write(int file, const void *bytes, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (!strikes_file(WRITE, "write", file)) return real(file, bytes, count);
    int number = errno;
    off_t at = lseek(file, 0, SEEK_CUR);
    if (count > 1 && at >= 0 && real(file, bytes, count / 2) >= 0 && !fault.lasting) lseek(file, at, SEEK_SET);
    errno = number;
    return -1;
}
ssize_t pwrite(int file, const void *bytes, size_t count, off_t at) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    if (!strikes_file(WRITE, "pwrite", file)) return real(file, bytes, count, at);
    int number = errno;
    if (count > 1) (void)!real(file, bytes, count / 2, at);
    errno = number;
    return -1;
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) ALIAS(pwrite);
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return strikes_file(WRITE, "writev", file) ? -1 : real(file, parts, count);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t);
    return strikes_file(WRITE, "pwritev", file) ? -1 : real(file, parts, count, at);
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t at) ALIAS(pwritev);
ssize_t sendfile(int to, int from, off_t *at, size_t count) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    return strikes_file(WRITE, "sendfile", to) ? -1 : real(to, from, at, count);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t count) ALIAS(sendfile);
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t count, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    return strikes_file(WRITE, "copy_file_range", to) ? -1 : real(from, a, to, b, count, flags);
}
int ftruncate(int file, off_t length) {
    REAL(int, ftruncate, int, off_t);
    return strikes_file(WRITE, "ftruncate", file) ? -1 : real(file, length);
}
int ftruncate64(int file, off64_t length) ALIAS(ftruncate);
size_t fwrite(const void *bytes, size_t size, size_t count, FILE *to) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    return strikes_file(WRITE, "fwrite", fileno(to)) ? 0 : real(bytes, size, count, to);
}

int fsync(int file) {
    REAL(int, fsync, int);
    return strikes_file(SYNC, "fsync", file) ? -1 : real(file);
}
int fdatasync(int file) {
    REAL(int, fdatasync, int);
    return strikes_file(SYNC, "fdatasync", file) ? -1 : real(file);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return strikes_path(RENAME, "rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    return strikes_path(RENAME, "renameat", b, to) ? -1 : real(a, from, b, to);
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    return strikes_path(RENAME, "link", AT_FDCWD, to) ? -1 : real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    return strikes_path(RENAME, "linkat", b, to) ? -1 : real(a, from, b, to, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return strikes_path(CREATE, "mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return strikes_path(CREATE, "mkdirat", folder, path) ? -1 : real(folder, path, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(int, openat, int, const char *, int, ...);
    mode_t mode = 0;
    if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    if ((flags & O_CREAT) && strikes_path(CREATE, "open", folder, path)) return -1;
    return real(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) ALIAS(openat);
int open(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    return openat(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) ALIAS(open);
FILE *fopen(const char *path, const char *how) {
    REAL(FILE *, fopen, const char *, const char *);
    if (strpbrk(how, "wa") && strikes_path(CREATE, "fopen", AT_FDCWD, path)) return NULL;
    return real(path, how);
}
FILE *fopen64(const char *path, const char *how) ALIAS(fopen);

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    return strikes_path(REMOVE, "unlink", AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    return strikes_path(REMOVE, "unlinkat", folder, path) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    return strikes_path(REMOVE, "rmdir", AT_FDCWD, path) ? -1 : real(path);
}

/* The clock on the wall; steady clocks are not touched. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int code = real(clock, now);
    if (shifted && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += fault.seconds;
    return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, gettimeofday, struct timeval *restrict, void *restrict);
    int code = real(now, zone);
    if (shifted) now->tv_sec += fault.seconds;
    return code;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
