// The striped loop of XXH3: eight 64-bit accumulators, 64 bytes a step. The rest of the hash is in xxh3.cpp.
#include "kernels.h"
#include "vec.h"
#include "xxh3_secret.h"

namespace {

// Ahead of the hardware prefetcher, which stops at every 4 KiB page.
constexpr size_t PREFETCH_BYTES = 2048;

#if defined(__AVX512F__)
typedef uint64_t Part __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint64_t Part __attribute__((vector_size(32)));
#else
typedef uint64_t Part __attribute__((vector_size(16)));
#endif
constexpr size_t PARTS = STRIPE_BYTES / sizeof(Part);

struct Accumulators {
    Part part[PARTS];
};

// (x mod 2^32) * (x / 2^32), which is one instruction: a 64-bit multiplication would be several.
LMPIPE_INLINE Part multiply_halves(Part x) {
#if defined(__AVX512F__)
    return (Part)_mm512_mul_epu32((__m512i)x, _mm512_srli_epi64((__m512i)x, 32));
#elif defined(__AVX2__)
    return (Part)_mm256_mul_epu32((__m256i)x, _mm256_srli_epi64((__m256i)x, 32));
#elif defined(__SSE2__)
    return (Part)_mm_mul_epu32((__m128i)x, _mm_srli_epi64((__m128i)x, 32));
#elif defined(__ARM_NEON)
    return (Part)vmull_u32(vmovn_u64((uint64x2_t)x), vshrn_n_u64((uint64x2_t)x, 32));
#else
    return (x & 0xFFFFFFFFu) * (x >> 32);
#endif
}

LMPIPE_INLINE Part swap_neighbours(Part x) {
#if defined(__AVX512F__)
    return (Part)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_BADC);
#elif defined(__AVX2__)
    return (Part)_mm256_shuffle_epi32((__m256i)x, 0x4E);
#else
    return (Part){x[1], x[0]};
#endif
}

LMPIPE_INLINE void accumulate(Accumulators &acc, const uint8_t *stripe, const uint8_t *secret) {
    for (size_t i = 0; i < PARTS; i++) {
        const Part data = load<Part>(stripe + i * sizeof(Part));
        acc.part[i] += swap_neighbours(data);
        acc.part[i] += multiply_halves(data ^ load<Part>(secret + i * sizeof(Part)));
    }
}

LMPIPE_INLINE void scramble(Accumulators &acc) {
    for (size_t i = 0; i < PARTS; i++) {
        Part x = acc.part[i];
        x ^= x >> 47;
        x ^= load<Part>(SECRET + SECRET_BYTES - STRIPE_BYTES + i * sizeof(Part));
        // x * PRIME32_1 modulo 2^64 from two 32-bit multiplications.
        const Part prime = (Part){} + PRIME32_1;
        const Part low = x & 0xFFFFFFFFu, high = x >> 32;
        acc.part[i] = multiply_halves(low | (prime << 32)) + (multiply_halves(high | (prime << 32)) << 32);
    }
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

void xxh3_accumulate(const uint8_t *data, size_t bytes, uint64_t out[8]) {
    static const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    constexpr size_t BLOCK_BYTES = STRIPE_BYTES * STRIPES_PER_BLOCK;
    Accumulators acc;
    memcpy(&acc, start, sizeof acc);
    // The last block is the remainder even when it is a full one.
    const size_t blocks = (bytes - 1) / BLOCK_BYTES;
    for (size_t b = 0; b < blocks; b++) {
        for (size_t s = 0; s < STRIPES_PER_BLOCK; s++) {
            const uint8_t *stripe = data + b * BLOCK_BYTES + s * STRIPE_BYTES;
            __builtin_prefetch(stripe + PREFETCH_BYTES);
            accumulate(acc, stripe, SECRET + 8 * s);
        }
        scramble(acc);
    }
    const uint8_t *rest = data + blocks * BLOCK_BYTES;
    const size_t stripes = (bytes - blocks * BLOCK_BYTES - 1) / STRIPE_BYTES;
    for (size_t s = 0; s < stripes; s++) accumulate(acc, rest + s * STRIPE_BYTES, SECRET + 8 * s);
    accumulate(acc, data + bytes - STRIPE_BYTES, SECRET + SECRET_BYTES - STRIPE_BYTES - 7);
    memcpy(out, &acc, sizeof acc);
}

}  // namespace lmpipe::LMPIPE_LEVEL
