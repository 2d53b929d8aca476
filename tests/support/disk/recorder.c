/* Records what a process does to the files below $RECORD_ROOT, for tests.support.disk: loaded by LD_PRELOAD.
 *
 * Each change becomes one record at the end of $RECORD_LOG: "OP INODE OFFSET LENGTH LENGTH LENGTH\n", a path,
 * another path, data. A lock makes the order of the records that of the changes. fsync is recorded, not done.
 * While the file $RECORD_FULL exists, whatever needs space fails with ENOSPC. With $RECORD_STOP, a number, the
 * process is killed before that change; with $RECORD_ONLY only changes of paths with one of these words, which
 * colons separate, are counted, and with $RECORD_FROM only while this file exists.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root, *log_path, *full, *only, *from;
static size_t root_length;
static long stop;

static void renew(void) { pthread_mutex_init(&lock, NULL); }

__attribute__((constructor)) static void begin(void)
{
    const char *number = getenv("RECORD_STOP"), *where = getenv("RECORD_ROOT");
    log_path = getenv("RECORD_LOG");
    if (log_path == NULL || where == NULL)
        return;
    full = getenv("RECORD_FULL");
    only = getenv("RECORD_ONLY");
    from = getenv("RECORD_FROM");
    stop = number == NULL ? 0 : atol(number);
    root_length = strlen(where);
    root = where;
    pthread_atfork(NULL, NULL, renew);
}

static int below(const char *path)
{
    return root != NULL && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute path of what is named by a directory and a path; whether it is recorded. */
static int resolve(int directory, const char *path, char *to)
{
    char link[64];
    ssize_t n = 0;
    if (root == NULL || path == NULL)
        return 0;
    if (path[0] == '/') {
        snprintf(to, PATH_MAX, "%s", path);
        return below(to);
    }
    if (directory == AT_FDCWD) {
        if (getcwd(to, PATH_MAX) == NULL)
            return 0;
        n = strlen(to);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        n = readlink(link, to, PATH_MAX - 1);
        if (n < 0)
            return 0;
    }
    snprintf(to + n, PATH_MAX - n, "/%s", path);
    return below(to);
}

static int recorded(int fd, char *to, struct stat *status)
{
    int before = errno, is = 0;
    if (root != NULL && fstat(fd, status) == 0 && (S_ISREG(status->st_mode) || S_ISDIR(status->st_mode))) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, to, PATH_MAX - 1);
        if (n > 0) {
            to[n] = 0;
            is = below(to);
        }
    }
    errno = before;
    return is;
}

static void maybe_stop(const char *path)
{
    int counts = only == NULL;
    for (const char *word = only; word != NULL && *word && !counts;) {
        size_t n = strcspn(word, ":");
        counts = n && memmem(path + root_length, strlen(path + root_length), word, n) != NULL;
        word += n + (word[n] == ':');
    }
    if (stop && counts && from != NULL && syscall(SYS_faccessat, AT_FDCWD, from, F_OK) != 0)
        counts = 0;
    if (stop && counts && --stop == 0) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;)
            pause();
    }
}

static int is_full(void)
{
    if (full == NULL || syscall(SYS_faccessat, AT_FDCWD, full, F_OK) != 0)
        return 0;
    errno = ENOSPC;
    return 1;
}

static void record(char op, unsigned long inode, long offset, const char *path, const char *other, const void *data,
                   size_t size)
{
    int before = errno;
    char head[128];
    int n = snprintf(head, sizeof head, "%c %lu %ld %zu %zu %zu\n", op, inode, offset, strlen(path), strlen(other), size);
    struct iovec parts[] = {
        {head, n}, {(void *)path, strlen(path)}, {(void *)other, strlen(other)}, {(void *)data, size}};
    /* Each time: programs close descriptors that they have not opened. */
    int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    syscall(SYS_writev, fd, parts, 4);
    syscall(SYS_close, fd);
    errno = before;
}

#define LOCK pthread_mutex_lock(&lock)
#define UNLOCK pthread_mutex_unlock(&lock)

/* -- files by path ----------------------------------------------------------------------------------------- */

static int open_it(int directory, const char *path, int flags, mode_t mode)
{
    char to[PATH_MAX];
    struct stat status;
    int fd;
    if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE || !resolve(directory, path, to))
        return syscall(SYS_openat, directory, path, flags, mode);
    LOCK;
    int is_there = syscall(SYS_faccessat, directory, path, F_OK) == 0;
    if (!is_there || (flags & O_TRUNC))
        maybe_stop(to);
    if (!is_there && is_full()) {
        UNLOCK;
        return -1;
    }
    fd = syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode)) {
        if (!is_there)
            record('C', status.st_ino, 0, to, "", "", 0);
        else if (flags & O_TRUNC)
            record('T', status.st_ino, 0, to, "", "", 0);
    }
    UNLOCK;
    return fd;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) { MODE return open_it(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_it(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int at, const char *path, int flags, ...) { MODE return open_it(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE return open_it(at, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_it(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }

static int rename_it(int at, const char *old, int to_at, const char *new, unsigned flags)
{
    char old_path[PATH_MAX], to[PATH_MAX];
    int is_from = resolve(at, old, old_path), is_to = resolve(to_at, new, to);
    if (!is_from && !is_to)
        return syscall(SYS_renameat2, at, old, to_at, new, flags);
    LOCK;
    maybe_stop(to);
    int result = syscall(SYS_renameat2, at, old, to_at, new, flags);
    if (result == 0)
        record('R', 0, 0, old_path, to, "", 0);
    UNLOCK;
    return result;
}

int rename(const char *old, const char *new) { return rename_it(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int at, const char *old, int to, const char *new) { return rename_it(at, old, to, new, 0); }
int renameat2(int at, const char *old, int to, const char *new, unsigned f) { return rename_it(at, old, to, new, f); }

static int remove_it(int at, const char *path, int flags)
{
    char to[PATH_MAX];
    if (!resolve(at, path, to))
        return syscall(SYS_unlinkat, at, path, flags);
    LOCK;
    maybe_stop(to);
    int result = syscall(SYS_unlinkat, at, path, flags);
    if (result == 0)
        record('U', 0, 0, to, "", "", 0);
    UNLOCK;
    return result;
}

int unlink(const char *path) { return remove_it(AT_FDCWD, path, 0); }
int unlinkat(int at, const char *path, int flags) { return remove_it(at, path, flags); }
int rmdir(const char *path) { return remove_it(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode)
{
    char to[PATH_MAX];
    if (!resolve(at, path, to))
        return syscall(SYS_mkdirat, at, path, mode);
    LOCK;
    maybe_stop(to);
    int result = is_full() ? -1 : syscall(SYS_mkdirat, at, path, mode);
    if (result == 0)
        record('D', 0, 0, to, "", "", 0);
    UNLOCK;
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int at, const char *old, int to_at, const char *new, int flags)
{
    char old_path[PATH_MAX], to[PATH_MAX];
    int is_to = resolve(to_at, new, to);
    if (!resolve(at, old, old_path) || !is_to)
        return syscall(SYS_linkat, at, old, to_at, new, flags);
    LOCK;
    maybe_stop(to);
    int result = is_full() ? -1 : syscall(SYS_linkat, at, old, to_at, new, flags);
    if (result == 0)
        record('L', 0, 0, old_path, to, "", 0);
    UNLOCK;
    return result;
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* -- bytes ------------------------------------------------------------------------------------------------- */

static ssize_t write_it(int fd, const void *data, size_t size, off_t offset)
{
    char to[PATH_MAX];
    struct stat status;
    if (!recorded(fd, to, &status))
        return offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    LOCK;
    maybe_stop(to);
    ssize_t n = -1;
    if (!is_full())
        n = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    if (n > 0)
        record('W', status.st_ino, offset < 0 ? lseek(fd, 0, SEEK_CUR) - n : offset, to, "", data, n);
    UNLOCK;
    return n;
}

ssize_t write(int fd, const void *data, size_t size) { return write_it(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return write_it(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return write_it(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    char to[PATH_MAX];
    struct stat status;
    ssize_t done = 0;
    if (!recorded(fd, to, &status))
        return syscall(SYS_writev, fd, parts, count);
    for (int i = 0; i < count; i++) {
        ssize_t n = write_it(fd, parts[i].iov_base, parts[i].iov_len, -1);
        if (n < 0)
            return done ? done : n;
        done += n;
        if ((size_t)n < parts[i].iov_len)
            break;
    }
    return done;
}

static int truncate_fd(int fd, off_t size)
{
    char to[PATH_MAX];
    struct stat status;
    if (!recorded(fd, to, &status))
        return syscall(SYS_ftruncate, fd, size);
    LOCK;
    maybe_stop(to);
    int result = size > status.st_size && is_full() ? -1 : syscall(SYS_ftruncate, fd, size);
    if (result == 0)
        record('T', status.st_ino, size, to, "", "", 0);
    UNLOCK;
    return result;
}

int ftruncate(int fd, off_t size) { return truncate_fd(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_fd(fd, size); }

int truncate(const char *path, off_t size)
{
    int fd = open_it(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = truncate_fd(fd, size), before = errno;
    close(fd);
    errno = before;
    return result;
}

int truncate64(const char *path, off64_t size) { return truncate(path, size); }

/* What copies within the kernel would not be seen: callers have a way without it. */
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags)
{
    char path[PATH_MAX];
    struct stat status;
    if (!recorded(out, path, &status))
        return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
    errno = ENOSYS;
    return -1;
}

static ssize_t send_it(int out, int in, off_t *from, size_t size)
{
    char path[PATH_MAX];
    struct stat status;
    if (!recorded(out, path, &status))
        return syscall(SYS_sendfile, out, in, from, size);
    errno = EINVAL;
    return -1;
}

ssize_t sendfile(int out, int in, off_t *from, size_t size) { return send_it(out, in, from, size); }
ssize_t sendfile64(int out, int in, off64_t *from, size_t size) { return send_it(out, in, from, size); }

/* -- what makes it last ------------------------------------------------------------------------------------ */

static int sync_it(int fd, long call)
{
    char to[PATH_MAX];
    struct stat status;
    if (!recorded(fd, to, &status))
        return syscall(call, fd);
    LOCK;
    maybe_stop(to);
    record('S', S_ISDIR(status.st_mode) ? 0 : status.st_ino, 0, to, "", "", 0);
    UNLOCK;
    return 0;
}

int fsync(int fd) { return sync_it(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_it(fd, SYS_fdatasync); }
