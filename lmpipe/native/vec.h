// Vector types of the level a kernel is compiled for, on the vector extensions that GCC and clang share.
//
// Everything here has internal linkage: kernels of different levels must never share an inline function (CMakeLists.txt).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lmpipe.native: little-endian machines only; the digests and the shared words are laid out that way"
#endif

#define LMPIPE_INLINE static inline __attribute__((always_inline))

namespace {

typedef uint32_t U32x4 __attribute__((vector_size(16)));

// Picks lanes of the two vectors set side by side. GCC before 12 has only its own spelling of it.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LMPIPE_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef LMPIPE_SHUFFLE4
#define LMPIPE_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, U32x4{i, j, k, l})
#endif

template <typename T>
LMPIPE_INLINE T load(const void *from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <typename T>
LMPIPE_INLINE void store(void *to, T value) {
    memcpy(to, &value, sizeof value);
}

}  // namespace
