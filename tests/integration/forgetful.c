/* Loaded with LD_PRELOAD: notes what a file system that promises no more than POSIX has kept, below ROOT.
 *
 * fsync and fdatasync copy a file's content, or a directory's names, into SHADOW; nothing else makes anything durable.
 * What SHADOW holds is what a power cut at that moment leaves: a file without a copy is empty, a name that its
 * directory's list lacks is gone. Nothing is really synced, which only makes the tests quicker.
 *
 * PostgreSQL's own files get more: it takes the fsync of a new file for that of its name, as ext4, XFS and btrfs do.
 *
 * Inodes are known by number and time of birth, since numbers are used again. When SHADOW is gone the power is cut:
 * nothing is kept any more. ROOT and SHADOW are constants: PostgreSQL is started without our variables.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_postgres; /* noted at the start: PostgreSQL overwrites its arguments */

static void fail(const char *what) {
    dprintf(2, "forgetful: %s: %s\n", what, strerror(errno));
    abort();
}

static void inode_name(char *name, size_t size, int directory_fd, const char *path, struct statx *found) {
    int flags = AT_SYMLINK_NOFOLLOW | (*path ? 0 : AT_EMPTY_PATH);
    if (statx(directory_fd, path, flags, STATX_BASIC_STATS | STATX_BTIME, found) != 0) {
        *name = 0;
        return;
    }
    snprintf(name, size, "%llu-%lld-%u", (unsigned long long)found->stx_ino, (long long)found->stx_btime.tv_sec,
             found->stx_btime.tv_nsec);
}

static void write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t written = write(fd, data, size);
        if (written < 0) fail("write");
        data += written;
        size -= (size_t)written;
    }
}

static void copy_content(int fd, int copy) {
    static __thread char buffer[1 << 20];
    off_t at = 0;
    for (ssize_t got; (got = pread(fd, buffer, sizeof buffer, at)) != 0; at += got) {
        if (got < 0) fail("pread");
        write_all(copy, buffer, (size_t)got);
    }
}

/* Lines of: type, permissions, inode, name; each ends with a zero byte. */
static void copy_names(int fd, int copy) {
    int again = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = again < 0 ? NULL : fdopendir(again);
    if (directory == NULL) fail("fdopendir");
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char inode[64], line[512];
        struct statx found;
        inode_name(inode, sizeof inode, fd, entry->d_name, &found);
        if (!*inode) continue; /* removed meanwhile */
        char type = S_ISDIR(found.stx_mode) ? 'd' : S_ISREG(found.stx_mode) ? 'f' : 'x';
        int size = snprintf(line, sizeof line, "%c %o %s %s", type, found.stx_mode & 07777, inode, entry->d_name);
        write_all(copy, line, (size_t)size + 1);
    }
    closedir(directory);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    size_t root = strlen(ROOT);
    return strncmp(path, ROOT, root) == 0 && (path[root] == '/' || path[root] == 0);
}

static int open_again(int fd) { /* it may be open for writing only */
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, O_RDONLY | O_CLOEXEC);
    if (again < 0) fail("open");
    return again;
}

static void copy_into_shadow(int fd, const char *inode, int is_directory) {
    /* One at a time in all processes, so that an older copy never replaces a newer one. */
    int lock = open(SHADOW "/lock", O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock < 0 && errno == ENOENT) return; /* the power is cut */
    if (lock < 0 || flock(lock, LOCK_EX) != 0) fail("lock");
    int copy = open(SHADOW "/fresh", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (copy < 0 && errno != ENOENT) fail("copy");
    if (copy >= 0) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", SHADOW, inode);
        int again = open_again(fd);
        if (is_directory) copy_names(again, copy);
        else copy_content(again, copy);
        close(again);
        close(copy);
        if (rename(SHADOW "/fresh", path) != 0 && errno != ENOENT) fail("rename");
    }
    close(lock);
}

static int keep(int fd) {
    char inode[64], path[PATH_MAX];
    struct statx found;
    int saved = errno;
    inode_name(inode, sizeof inode, fd, "", &found);
    if (!*inode) return -1; /* EBADF */
    int is_directory = S_ISDIR(found.stx_mode);
    if (path_of(fd, path) && (S_ISREG(found.stx_mode) || is_directory)) {
        copy_into_shadow(fd, inode, is_directory);
        if (!is_directory && is_postgres) {
            *strrchr(path, '/') = 0;
            int parent = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (parent >= 0) {
                keep(parent);
                close(parent);
            }
        }
    }
    errno = saved;
    return 0;
}

int fsync(int fd) { return keep(fd); }
int fdatasync(int fd) { return keep(fd); }

/* Leaves the inode of ROOT for those who read SHADOW. */
__attribute__((constructor)) static void note_start(void) {
    is_postgres = strcmp(program_invocation_short_name, "postgres") == 0;
    char inode[64];
    struct statx found;
    inode_name(inode, sizeof inode, AT_FDCWD, ROOT, &found);
    int fd = open(SHADOW "/root", O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return;
    write_all(fd, inode, strlen(inode));
    close(fd);
}
