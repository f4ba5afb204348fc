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

// One block of the `split` codec, docs/decisions/0011-codec-formats.md.
enum class SplitForm : uint8_t { bf16 = 1, fp16 = 2, fp32 = 3 };
constexpr size_t SPLIT_NUMBERS = 4096, SPLIT_GROUP = 64;
constexpr uint8_t SPLIT_RAW = 255;

// As it is stored.
struct SplitRow {
    uint32_t offset;
    uint8_t top, bits;
    uint16_t escapes;
};

// Types of numbers, as an encoded chunk's header has them.
constexpr unsigned BF16 = 1, FP16 = 2, FP32 = 3;

// Numbers of a vector that the kernels of codecs of vectors have room for.
constexpr size_t MAX_HEAD_DIM = 1024;

// Where the exponents of fp8 vectors end: 2^-120 brings the largest fp32 to at most 448.
constexpr unsigned FP8_TOP_EXPONENT = 247;

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
    // Writes rest, planes and escapes of `groups` groups to `block`, which has room for 6 bytes a number and a group more.
    // The last `pads` numbers are zeros that do not count. SPLIT_RAW: no number of bits is shorter than the numbers.
    SplitRow (*split_encode)(SplitForm form, const uint8_t *numbers, size_t groups, size_t pads, uint8_t *block);
    // The inverse. False if codes and row differ in the number of escapes. `escapes` has room for all numbers and one group
    // more. With `stream`, `numbers` is aligned to a line, and store_fence() must follow.
    bool (*split_decode)(SplitForm form, const uint8_t *block, const uint8_t *escapes, size_t groups, SplitRow row,
                         uint8_t *numbers, bool stream);

    // Codecs of vectors: n vectors of dim numbers of a dtype. fp8: an exponent and dim codes for each.
    // False: a number is NaN or infinite.
    bool (*fp8_encode)(const uint8_t *from, unsigned dtype, size_t n, size_t dim, uint8_t *exponents, uint8_t *codes);
    // False: an exponent is over FP8_TOP_EXPONENT.
    bool (*fp8_decode)(const uint8_t *exponents, const uint8_t *codes, unsigned dtype, size_t n, size_t dim, uint8_t *to);
    // Vector i has bits[i] planes, 3, 4 or 8; scales and minima are fp16. False: a number is NaN or infinite, or a scale or
    // a minimum does not fit.
    bool (*rotated_encode)(const uint8_t *from, unsigned dtype, size_t n, size_t dim, const uint8_t *bits,
                           uint8_t *scales, uint8_t *minima, uint8_t *planes);
    // False: a scale or a minimum is not finite.
    bool (*rotated_decode)(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, unsigned dtype, size_t n,
                           size_t dim, const uint8_t *bits, uint8_t *to);
};

// The current table. Chosen at load time as the best one this CPU runs.
const Kernels &kernels();

// For tests: makes the named level current. False if it is unknown or this CPU cannot run it.
bool set_level(const char *name);

// The levels this CPU can run, worst first; returns how many (at most 4 are written).
size_t usable_levels(const Kernels *out[4]);

}  // namespace lmpipe
