// Declares the kernels of every level. A kernel source defines those of the one it is compiled for (LMPIPE_LEVEL).
#pragma once

#include "levels.h"

#define LMPIPE_KERNELS(level)                                                                                   \
    namespace lmpipe::level {                                                                                   \
    extern const unsigned blake3_lanes;                                                                         \
    extern const char *const copy_stores;                                                                       \
    void blake3_many(const uint8_t *items, size_t n, size_t item_bytes, uint8_t *out);                          \
    void blake3_chain(const uint8_t key[32], const uint8_t parent[16], const uint8_t *content, size_t n,        \
                      uint8_t *out);                                                                            \
    void xxh3_accumulate(const uint8_t *data, size_t bytes, uint64_t acc[8]);                                   \
    void copy_runs(const Run *runs, size_t n);                                                                  \
    void store_fence();                                                                                         \
    }

LMPIPE_KERNELS(generic)
LMPIPE_KERNELS(avx2)
LMPIPE_KERNELS(avx512)
