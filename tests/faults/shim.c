/* Loaded into a process with LD_PRELOAD: makes fsync fail, shifts the wall clock, and leads connections elsewhere.
 *
 * FAULT_CONTROL names a file shared with the test: a 32-bit integer, whether fsync fails; after four bytes of padding a
 * 64-bit one, how many ms the wall clock is off. FAULT_ROUTES is a list of PORT=PORT: who connects to the first port
 * gets to the second one, so that processes that were told the same address go by links of their own. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define ROUTES_MAX 64

struct control {
    int32_t fsync_fails, padding;
    int64_t clock_shift_ms;
};

static volatile struct control nothing;
static volatile struct control *control = &nothing;
static struct { in_port_t from, to; } routes[ROUTES_MAX];

__attribute__((constructor)) static void open_control(void) {
    const char *path = getenv("FAULT_CONTROL");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *shared = mmap(NULL, sizeof nothing, PROT_READ, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED) control = shared;
    close(fd);
}

__attribute__((constructor)) static void read_routes(void) {
    const char *text = getenv("FAULT_ROUTES");
    for (int n = 0; text && *text && n < ROUTES_MAX; n++) {
        char *end;
        routes[n].from = htons(strtol(text, &end, 10));
        routes[n].to = htons(*end == '=' ? strtol(end + 1, &end, 10) : 0);
        text = *end == ',' ? end + 1 : "";
    }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int fd) {
    if (control->fsync_fails) {
        errno = EIO;
        return -1;
    }
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    if (control->fsync_fails) {
        errno = EIO;
        return -1;
    }
    return REAL(fdatasync)(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = REAL(clock_gettime);
    int result = real(clock, now);
    int64_t shift_ms = control->clock_shift_ms;
    if (result || !shift_ms || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)) return result;
    int64_t ns = now->tv_nsec + shift_ms % 1000 * 1000000;
    now->tv_sec += shift_ms / 1000 + (ns < 0 ? -1 : ns >= 1000000000);
    now->tv_nsec = (ns + 1000000000) % 1000000000;
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec exact;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    if (result) *result = exact.tv_sec;
    return exact.tv_sec;
}

static in_port_t route(in_port_t port) {
    for (int n = 0; n < ROUTES_MAX && routes[n].to; n++)
        if (routes[n].from == port) return routes[n].to;
    return port;
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    static int (*real)(int, const struct sockaddr *, socklen_t);
    if (!real) real = REAL(connect);
    if (address->sa_family == AF_INET && size >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in other = *(const struct sockaddr_in *)address;
        other.sin_port = route(other.sin_port);
        return real(fd, (struct sockaddr *)&other, sizeof other);
    }
    if (address->sa_family == AF_INET6 && size >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 other = *(const struct sockaddr_in6 *)address;
        other.sin6_port = route(other.sin6_port);
        return real(fd, (struct sockaddr *)&other, sizeof other);
    }
    return real(fd, address, size);
}
