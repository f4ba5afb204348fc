// Makes chosen files fail: to be loaded with LD_PRELOAD. The environment variable LMPIPE_IO_FAULTS names a file of rules,
// which is read again whenever it changes (write a new one and rename it over), one rule a line:
//
//     PREFIX OP FAULT[%PROBABILITY]
//
//     PREFIX  of the absolute path of a file
//     OP      read, write, open (of any kind), sync, make (whatever creates, sizes, renames or removes, and opens for
//             writing), any
//     FAULT   a number of errno; short (half of it is done); flip (one bit of what is read is wrong); rate=BYTES a second
//
// and "clock any step=SECONDS" sets the wall clock forward, or back.
//
// Calls go to the kernel directly, so that nothing of the C library is called by what it calls.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum class Op { read, write, open, sync, make };
enum class Kind { error, brief, flip, rate, step };

struct Rule {
    std::string prefix, op;
    Kind kind;
    uint64_t value;
    double chance;
};

constexpr size_t BLOCK = 4096;
constexpr const char *NAMES[] = {"read", "write", "open", "sync", "make"};

std::mutex mutex;
std::vector<Rule> rules;
ino_t seen_inode = 0;
timespec seen_time{};
uint64_t disk_free_ns = 0;

double drawn() {
    thread_local std::mt19937_64 random{std::random_device{}()};
    return std::uniform_real_distribution<double>(0, 1)(random);
}

uint64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

std::string contents(const char *path) {
    const long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    std::string text;
    char part[4096];
    for (long count; fd >= 0 && (count = syscall(SYS_read, fd, part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(count));
    if (fd >= 0) syscall(SYS_close, fd);
    return text;
}

// Holding the mutex.
void refresh() {
    static const char *const path = getenv("LMPIPE_IO_FAULTS");
    struct stat found;
    if (!path || fstatat(AT_FDCWD, path, &found, 0) != 0) {
        rules.clear();
        seen_inode = 0;
        return;
    }
    if (found.st_ino == seen_inode && found.st_mtim.tv_sec == seen_time.tv_sec && found.st_mtim.tv_nsec == seen_time.tv_nsec)
        return;
    seen_inode = found.st_ino;
    seen_time = found.st_mtim;
    rules.clear();
    std::istringstream lines(contents(path));
    for (std::string line; std::getline(lines, line);) {
        Rule rule{};
        std::string fault;
        std::istringstream words(line);
        if (!(words >> rule.prefix >> rule.op >> fault)) continue;
        const size_t percent = fault.find('%');
        rule.chance = percent == std::string::npos ? 1.0 : std::stod(fault.substr(percent + 1));
        fault = fault.substr(0, percent);
        if (fault == "short") rule.kind = Kind::brief;
        else if (fault == "flip") rule.kind = Kind::flip;
        else if (fault.starts_with("step=")) rule.kind = Kind::step, rule.value = static_cast<uint64_t>(std::stoll(fault.substr(5)));
        else if (fault.starts_with("rate=")) rule.kind = Kind::rate, rule.value = std::stoull(fault.substr(5));
        else rule.kind = Kind::error, rule.value = std::stoull(fault);
        rules.push_back(rule);
    }
}

// What is to be done to one call.
struct Fault {
    int error = 0;
    bool brief = false, flip = false;
    uint64_t wait_until_ns = 0;
};

Fault fault_of(Op op, const char *path, uint64_t bytes = 0) {
    Fault fault;
    const int saved = errno;
    {
        std::lock_guard lock(mutex);
        refresh();
        for (const Rule &rule : rules) {
            if (strncmp(path, rule.prefix.c_str(), rule.prefix.size()) != 0) continue;
            if (rule.op != "any" && rule.op != NAMES[static_cast<int>(op)]) continue;
            if (rule.chance < 1.0 && drawn() >= rule.chance) continue;
            if (rule.kind == Kind::error) fault.error = static_cast<int>(rule.value);
            if (rule.kind == Kind::brief) fault.brief = true;
            if (rule.kind == Kind::flip) fault.flip = true;
            if (rule.kind == Kind::rate && rule.value) {  // one disk for all threads of this process
                disk_free_ns = std::max(disk_free_ns, now_ns()) + bytes * 1'000'000'000 / rule.value;
                fault.wait_until_ns = disk_free_ns;
            }
        }
    }
    for (uint64_t now; fault.wait_until_ns > (now = now_ns());) {
        const uint64_t left = fault.wait_until_ns - now;
        timespec rest{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
        nanosleep(&rest, nullptr);
    }
    errno = saved;
    return fault;
}

std::string path_of(int fd) {
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    const long count = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path);
    return count > 0 ? std::string(path, static_cast<size_t>(count)) : std::string();
}

// Whether there are any rules at present.
bool on() {
    const int saved = errno;
    std::lock_guard lock(mutex);
    refresh();
    errno = saved;
    return !rules.empty();
}

// Half of it, in whole blocks: O_DIRECT knows no others.
std::vector<iovec> half_of(const iovec *parts, int count, size_t total) {
    size_t left = total <= BLOCK ? total : std::max(total / 2 / BLOCK * BLOCK, BLOCK);
    std::vector<iovec> out;
    for (int i = 0; i < count && left; i++) {
        out.push_back({parts[i].iov_base, std::min(parts[i].iov_len, left)});
        left -= out.back().iov_len;
    }
    return out;
}

void flip_one(const std::vector<iovec> &parts, size_t bytes) {
    size_t at = bytes ? static_cast<size_t>(drawn() * static_cast<double>(bytes)) : 0;
    for (const iovec &part : parts) {
        if (at < part.iov_len && bytes) {
            static_cast<uint8_t *>(part.iov_base)[at] ^= static_cast<uint8_t>(1 << static_cast<int>(drawn() * 8));
            return;
        }
        at -= std::min(at, part.iov_len);
    }
}

// `offset` -1: where the file stands.
ssize_t transfer(Op op, int fd, const iovec *parts, int count, off_t offset) {
    size_t total = 0;
    for (int i = 0; i < count; i++) total += parts[i].iov_len;
    Fault fault;
    if (on()) fault = fault_of(op, path_of(fd).c_str(), total);
    if (fault.error) {
        errno = fault.error;
        return -1;
    }
    const std::vector<iovec> mine = fault.brief ? half_of(parts, count, total) : std::vector<iovec>(parts, parts + count);
    const bool reads = op == Op::read;
    const long done = offset < 0
                          ? syscall(reads ? SYS_readv : SYS_writev, fd, mine.data(), mine.size())
                          : syscall(reads ? SYS_preadv : SYS_pwritev, fd, mine.data(), mine.size(), offset, 0L);
    if (fault.flip && reads && done > 0) flip_one(mine, static_cast<size_t>(done));
    return done;
}

int refused(Op op, const std::string &path) {
    if (!on()) return 0;
    const Fault fault = fault_of(op, path.c_str());
    return fault.error;
}

std::string absolute(const char *path) {
    if (path[0] == '/') return path;
    char here[PATH_MAX];
    return syscall(SYS_getcwd, here, sizeof here) > 0 ? std::string(here) + "/" + path : std::string(path);
}

int open_any(int directory, const char *path, int flags, mode_t mode) {
    if (on()) {
        const std::string full =
            directory == AT_FDCWD || path[0] == '/' ? absolute(path) : path_of(directory) + "/" + path;
        int error = refused(Op::open, full);
        if (!error && (flags & (O_WRONLY | O_RDWR | O_CREAT))) error = refused(Op::make, full);
        if (error) {
            errno = error;
            return -1;
        }
    }
    return static_cast<int>(syscall(SYS_openat, directory, path, flags, mode));
}

mode_t mode_of(int flags, va_list arguments) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

// A call that changes names: on a path, or the file of a descriptor.
template <typename... Arguments>
int change(const std::string &path, long number, Arguments... arguments) {
    if (const int error = refused(Op::make, path)) {
        errno = error;
        return -1;
    }
    return static_cast<int>(syscall(number, arguments...));
}

int flushed(int fd, long number) {
    if (const int error = on() ? refused(Op::sync, path_of(fd)) : 0) {
        errno = error;
        return -1;
    }
    return static_cast<int>(syscall(number, fd));
}

std::string file_of(int fd) { return on() ? path_of(fd) : std::string(); }

}  // namespace

// Defined under the names of the C library by their symbols: its headers declare some of them otherwise.
#define REPLACE(result, name, ...)                         \
    extern "C" result faulty_##name(__VA_ARGS__) asm(#name); \
    extern "C" result faulty_##name(__VA_ARGS__)

#define REPLACE_OPEN(name)                                                                   \
    REPLACE(int, name, const char *path, int flags, ...) {                                   \
        va_list arguments;                                                                   \
        va_start(arguments, flags);                                                          \
        const mode_t mode = mode_of(flags, arguments);                                       \
        va_end(arguments);                                                                   \
        return open_any(AT_FDCWD, path, flags, mode);                                        \
    }
REPLACE_OPEN(open)
REPLACE_OPEN(open64)

#define REPLACE_OPENAT(name)                                                                 \
    REPLACE(int, name, int directory, const char *path, int flags, ...) {                    \
        va_list arguments;                                                                   \
        va_start(arguments, flags);                                                          \
        const mode_t mode = mode_of(flags, arguments);                                       \
        va_end(arguments);                                                                   \
        return open_any(directory, path, flags, mode);                                       \
    }
REPLACE_OPENAT(openat)
REPLACE_OPENAT(openat64)

#define REPLACE_MOVE(name, op, type)                                                         \
    REPLACE(ssize_t, name, int fd, type buffer, size_t count, off_t offset) {                \
        const iovec part{const_cast<void *>(buffer), count};                                 \
        return transfer(Op::op, fd, &part, 1, offset);                                       \
    }
REPLACE_MOVE(pread, read, void *)
REPLACE_MOVE(pread64, read, void *)
REPLACE_MOVE(pwrite, write, const void *)
REPLACE_MOVE(pwrite64, write, const void *)

#define REPLACE_VECTOR(name, op)                                                             \
    REPLACE(ssize_t, name, int fd, const iovec *parts, int count, off_t offset) {            \
        return transfer(Op::op, fd, parts, count, offset);                                   \
    }
REPLACE_VECTOR(preadv, read)
REPLACE_VECTOR(preadv64, read)
REPLACE_VECTOR(pwritev, write)
REPLACE_VECTOR(pwritev64, write)

// Nobody here asks for anything by `flags`.
#define REPLACE_VECTOR_2(name, op)                                                           \
    REPLACE(ssize_t, name, int fd, const iovec *parts, int count, off_t offset, int) {       \
        return transfer(Op::op, fd, parts, count, offset);                                   \
    }
REPLACE_VECTOR_2(preadv2, read)
REPLACE_VECTOR_2(preadv64v2, read)
REPLACE_VECTOR_2(pwritev2, write)
REPLACE_VECTOR_2(pwritev64v2, write)

REPLACE(ssize_t, read, int fd, void *buffer, size_t count) {
    const iovec part{buffer, count};
    return transfer(Op::read, fd, &part, 1, -1);
}
REPLACE(ssize_t, write, int fd, const void *buffer, size_t count) {
    const iovec part{const_cast<void *>(buffer), count};
    return transfer(Op::write, fd, &part, 1, -1);
}
REPLACE(ssize_t, readv, int fd, const iovec *parts, int count) { return transfer(Op::read, fd, parts, count, -1); }
REPLACE(ssize_t, writev, int fd, const iovec *parts, int count) { return transfer(Op::write, fd, parts, count, -1); }

REPLACE(int, fsync, int fd) { return flushed(fd, SYS_fsync); }
REPLACE(int, fdatasync, int fd) { return flushed(fd, SYS_fdatasync); }

#define REPLACE_FALLOCATE(name)                                                              \
    REPLACE(int, name, int fd, off_t offset, off_t bytes) {                                  \
        return change(file_of(fd), SYS_fallocate, fd, 0, offset, bytes) == 0 ? 0 : errno;    \
    }
REPLACE_FALLOCATE(posix_fallocate)
REPLACE_FALLOCATE(posix_fallocate64)

#define REPLACE_TRUNCATE(name) \
    REPLACE(int, name, int fd, off_t bytes) { return change(file_of(fd), SYS_ftruncate, fd, bytes); }
REPLACE_TRUNCATE(ftruncate)
REPLACE_TRUNCATE(ftruncate64)

REPLACE(int, clock_gettime, clockid_t clock, timespec *now) {
    const int result = static_cast<int>(syscall(SYS_clock_gettime, clock, now));
    if (result == 0 && clock == CLOCK_REALTIME && on()) {
        std::lock_guard lock(mutex);
        for (const Rule &rule : rules)
            if (rule.kind == Kind::step) now->tv_sec += static_cast<time_t>(static_cast<int64_t>(rule.value));
    }
    return result;
}

REPLACE(int, mkdir, const char *path, mode_t mode) { return change(absolute(path), SYS_mkdirat, AT_FDCWD, path, mode); }
REPLACE(int, unlink, const char *path) { return change(absolute(path), SYS_unlinkat, AT_FDCWD, path, 0); }
REPLACE(int, rename, const char *from, const char *to) {
    return change(absolute(to), SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
REPLACE(int, link, const char *from, const char *to) {
    return change(absolute(to), SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
REPLACE(int, linkat, int from_directory, const char *from, int directory, const char *to, int flags) {
    return change(absolute(to), SYS_linkat, from_directory, from, directory, to, flags);
}
