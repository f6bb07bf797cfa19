// Counts the system calls that change what is under a directory, and at the chosen one kills the process or lets the disk
// be full from then on. For LD_PRELOAD.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum Mode { kOff, kCount, kKill, kFull };

static char root[PATH_MAX];
static long chosen, count;
static enum Mode mode = kOff;

void arm(const char *directory, long at, int what) {
  strncpy(root, directory, sizeof root - 1);
  chosen = at;
  count = 0;
  mode = what;
}

long counted(void) { return count; }

static int inside(const char *path) { return !strncmp(path, root, strlen(root)); }

static int of_descriptor(int descriptor) {
  char link[64], path[PATH_MAX];
  if (mode == kOff) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return inside(path);
}

static int of_path(int directory, const char *path) {
  if (mode == kOff) return 0;
  return path[0] == '/' || directory == AT_FDCWD ? inside(path) : of_descriptor(directory);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Counts a call; whether the disk is full for it, where it needs room.
static int full(int ours, int needs_room) {
  if (!ours) return 0;
  count++;
  if (mode == kKill && count == chosen) die();
  if (mode == kFull && count >= chosen && needs_room) {
    errno = ENOSPC;
    return 1;
  }
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Half of it is written where the process is killed, or where the disk becomes full.
#define WRITE(name, half, ...)                                  \
  if (!of_descriptor(descriptor)) return REAL(name)(__VA_ARGS__); \
  count++;                                                      \
  if (mode == kKill && count == chosen) {                       \
    half;                                                       \
    die();                                                      \
  }                                                             \
  if (mode == kFull && count == chosen && size > 1) return half; \
  if (mode == kFull && count >= chosen) {                       \
    errno = ENOSPC;                                             \
    return -1;                                                  \
  }                                                             \
  return REAL(name)(__VA_ARGS__)

ssize_t write(int descriptor, const void *data, size_t size) {
  WRITE(write, REAL(write)(descriptor, data, size / 2), descriptor, data, size);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
  WRITE(pwrite, REAL(pwrite)(descriptor, data, size / 2, at), descriptor, data, size, at);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
  WRITE(pwrite64, REAL(pwrite64)(descriptor, data, size / 2, at), descriptor, data, size, at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int size) {
  WRITE(writev, REAL(writev)(descriptor, parts, size / 2), descriptor, parts, size);
}

ssize_t sendfile(int descriptor, int from, off_t *at, size_t size) {
  WRITE(sendfile, REAL(sendfile)(descriptor, from, at, size / 2), descriptor, from, at, size);
}

ssize_t sendfile64(int descriptor, int from, off64_t *at, size_t size) {
  WRITE(sendfile64, REAL(sendfile64)(descriptor, from, at, size / 2), descriptor, from, at, size);
}

ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t size, unsigned flags) {
  WRITE(copy_file_range, REAL(copy_file_range)(from, at, descriptor, to, size / 2, flags), from, at, descriptor, to, size,
        flags);
}

#define MODE_OF(flags)                                    \
  mode_t permissions = 0;                                 \
  if ((flags) & O_CREAT) {                                \
    va_list rest;                                         \
    va_start(rest, flags);                                \
    permissions = va_arg(rest, mode_t);                   \
    va_end(rest);                                         \
  }                                                       \
  const int changes = ((flags) & (O_CREAT | O_TRUNC)) != 0

int open(const char *path, int flags, ...) {
  MODE_OF(flags);
  return full(changes && of_path(AT_FDCWD, path), flags & O_CREAT) ? -1 : REAL(open)(path, flags, permissions);
}

int open64(const char *path, int flags, ...) {
  MODE_OF(flags);
  return full(changes && of_path(AT_FDCWD, path), flags & O_CREAT) ? -1 : REAL(open64)(path, flags, permissions);
}

int openat(int directory, const char *path, int flags, ...) {
  MODE_OF(flags);
  return full(changes && of_path(directory, path), flags & O_CREAT) ? -1
                                                                    : REAL(openat)(directory, path, flags, permissions);
}

int openat64(int directory, const char *path, int flags, ...) {
  MODE_OF(flags);
  return full(changes && of_path(directory, path), flags & O_CREAT)
             ? -1
             : REAL(openat64)(directory, path, flags, permissions);
}

FILE *fopen(const char *path, const char *how) {
  return full(how[0] != 'r' && of_path(AT_FDCWD, path), 1) ? NULL : REAL(fopen)(path, how);
}

FILE *fopen64(const char *path, const char *how) {
  return full(how[0] != 'r' && of_path(AT_FDCWD, path), 1) ? NULL : REAL(fopen64)(path, how);
}

int mkdir(const char *path, mode_t permissions) {
  return full(of_path(AT_FDCWD, path), 1) ? -1 : REAL(mkdir)(path, permissions);
}

int symlink(const char *to, const char *path) {
  return full(of_path(AT_FDCWD, path), 1) ? -1 : REAL(symlink)(to, path);
}

int rename(const char *from, const char *to) {
  return full(of_path(AT_FDCWD, to), 0) ? -1 : REAL(rename)(from, to);
}

int renameat2(int from_directory, const char *from, int directory, const char *to, unsigned flags) {
  return full(of_path(directory, to), 0) ? -1 : REAL(renameat2)(from_directory, from, directory, to, flags);
}

int unlink(const char *path) { return full(of_path(AT_FDCWD, path), 0) ? -1 : REAL(unlink)(path); }

int unlinkat(int directory, const char *path, int flags) {
  return full(of_path(directory, path), 0) ? -1 : REAL(unlinkat)(directory, path, flags);
}

int rmdir(const char *path) { return full(of_path(AT_FDCWD, path), 0) ? -1 : REAL(rmdir)(path); }

int truncate(const char *path, off_t size) { return full(of_path(AT_FDCWD, path), 0) ? -1 : REAL(truncate)(path, size); }

int truncate64(const char *path, off64_t size) {
  return full(of_path(AT_FDCWD, path), 0) ? -1 : REAL(truncate64)(path, size);
}

int ftruncate(int descriptor, off_t size) {
  return full(of_descriptor(descriptor), 0) ? -1 : REAL(ftruncate)(descriptor, size);
}

int ftruncate64(int descriptor, off64_t size) {
  return full(of_descriptor(descriptor), 0) ? -1 : REAL(ftruncate64)(descriptor, size);
}
