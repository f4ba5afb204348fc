// Declares the kernels of every level. A kernel source defines those of the one it is compiled for (LMPIPE_LEVEL).
#pragma once

#include "levels.h"

#define LMPIPE_SPLIT_KERNELS(level)                                                                             \
    namespace lmpipe::level {                                                                                   \
    SplitRow split_encode(SplitForm form, const uint8_t *numbers, size_t groups, size_t pads, uint8_t *block);  \
    bool split_decode(SplitForm form, const uint8_t *block, const uint8_t *escapes, size_t groups,              \
                      SplitRow row, uint8_t *numbers, bool stream);                                             \
    }

#define LMPIPE_KERNELS(level)                                                                                   \
    LMPIPE_SPLIT_KERNELS(level)                                                                                 \
    namespace lmpipe::level {                                                                                   \
    extern const unsigned blake3_lanes;                                                                         \
    extern const char *const copy_stores;                                                                       \
    void blake3_many(const uint8_t *items, size_t n, size_t item_bytes, uint8_t *out);                          \
    void blake3_chain(const uint8_t key[32], const uint8_t parent[16], const uint8_t *content, size_t n,        \
                      uint8_t *out);                                                                            \
    void xxh3_accumulate(const uint8_t *data, size_t bytes, uint64_t acc[8]);                                   \
    void copy_runs(const Run *runs, size_t n);                                                                  \
    void store_fence();                                                                                         \
    bool fp8_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, uint8_t *exponents,              \
                    uint8_t *codes);                                                                            \
    bool fp8_decode(const uint8_t *exponents, const uint8_t *codes, unsigned dtype, size_t n, size_t dim,       \
                    uint8_t *to);                                                                               \
    bool rotated_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, const uint8_t *bits,         \
                        uint8_t *scales, uint8_t *minima, uint8_t *planes);                                     \
    bool rotated_decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, unsigned dtype,    \
                        size_t n, size_t dim, const uint8_t *bits, uint8_t *to);                                \
    }

LMPIPE_KERNELS(generic)
LMPIPE_KERNELS(avx2)
LMPIPE_KERNELS(avx512)
LMPIPE_SPLIT_KERNELS(avx512vbmi2)
