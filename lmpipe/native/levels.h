// The instruction-set levels: one table of kernels per level, one of them current.
//
// A kernel is a plain function over raw pointers. It knows nothing of Python, threads or bounds: its caller has checked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmpipe {

// One copy of `bytes` bytes; source and destination never overlap.
struct Run {
    const uint8_t *source;
    uint8_t *destination;
    size_t bytes;
};

struct Kernels {
    const char *name;
    unsigned blake3_lanes;
    const char *copy_stores;  // what kind of stores copy_runs uses for long runs

    // items: n * item_bytes bytes; out: n * 32 bytes.
    void (*blake3_many)(const uint8_t *items, size_t n, size_t item_bytes, uint8_t *out);
    // out[i] = BLAKE3_keyed(key, out[i-1] || content[i])[:16]; content: n * 32 bytes, out: n * 16 bytes.
    void (*blake3_chain)(const uint8_t key[32], const uint8_t parent[16], const uint8_t *content, size_t n, uint8_t *out);
    // The striped part of XXH3 for inputs over 240 bytes: initialises and fills the eight accumulators.
    void (*xxh3_accumulate)(const uint8_t *data, size_t bytes, uint64_t acc[8]);
    // Copies the runs with streaming stores where they pay; store_fence() must follow before anybody is told.
    void (*copy_runs)(const Run *runs, size_t n);
    void (*store_fence)();
};

// The current table. Chosen at load time as the best one this CPU runs.
const Kernels &kernels();

// For tests: makes the named level current. False if it is unknown or this CPU cannot run it.
bool set_level(const char *name);

// The levels this CPU can run, worst first; returns how many (at most 4 are written).
size_t usable_levels(const Kernels *out[4]);

}  // namespace lmpipe
