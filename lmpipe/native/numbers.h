// Numbers of a chunk (bf16, fp16, fp32) as registers of fp32, and back.
//
// Numbers come in pairs of registers, the even ones apart from the odd ones: for bf16 that costs one instruction each,
// and it is where a butterfly of neighbours wants them. Rounding is to nearest even, by integers where an instruction
// set has nothing: every level gives the same bits.
#pragma once

#include "levels.h"
#include "vec.h"

namespace {

using lmpipe::BF16;
using lmpipe::FP16;

#if defined(__AVX512F__)
constexpr size_t LANES = 16;
#elif defined(__AVX2__)
constexpr size_t LANES = 8;
#else
constexpr size_t LANES = 4;
#endif
constexpr size_t PAIR = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct FloatPair {
    Floats a, b;
};

template <unsigned DTYPE>
constexpr size_t ITEM_BYTES = DTYPE == BF16 || DTYPE == FP16 ? 2 : 4;

// x in every lane.
LMPIPE_INLINE Floats all(float x) { return x - (Floats){}; }
LMPIPE_INLINE Words all(uint32_t x) { return (Words){} + x; }
LMPIPE_INLINE Words choose(Ints mask, Words yes, Words no) { return mask ? yes : no; }

LMPIPE_INLINE bool any(Words mask) {
    uint32_t found = 0;
    for (size_t i = 0; i < LANES; i++) found |= mask[i];
    return found;
}

// Of numbers; where one of two is NaN, either may come back.
LMPIPE_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
    return (Floats)choose((Ints)(a < b), (Words)a, (Words)b);
#endif
}

LMPIPE_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
    return (Floats)choose((Ints)(a > b), (Words)a, (Words)b);
#endif
}

// Of numbers below 2^31.
LMPIPE_INLINE Words larger_word(Words a, Words b) {
#if defined(__AVX512F__)
    return (Words)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return choose(((Ints)a > (Ints)b), a, b);
#endif
}

// ---- lanes of other widths; GCC makes no vector instructions of __builtin_convertvector here ------------------------

LMPIPE_INLINE Words widened(Bytes x) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
#elif defined(__SSE2__)
    const __m128i zero = _mm_setzero_si128();
    return (Words)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(load<int>(&x)), zero), zero);
#else
    return __builtin_convertvector(x, Words);
#endif
}

LMPIPE_INLINE Words widened(Shorts x) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#elif defined(__SSE2__)
    return (Words)_mm_unpacklo_epi16(_mm_cvtsi64_si128((int64_t)x), _mm_setzero_si128());
#else
    return __builtin_convertvector(x, Words);
#endif
}

// Of numbers that fit.
LMPIPE_INLINE Shorts shorts_of(Words x) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#elif defined(__SSE2__)
    const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)x, 16), 16);
    return (Shorts)_mm_cvtsi128_si64(_mm_packs_epi32(extended, extended));
#else
    return __builtin_convertvector(x, Shorts);
#endif
}

// Of numbers that fit.
LMPIPE_INLINE Bytes bytes_of(Words x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
    const __m128i shorts = (__m128i)shorts_of(x);
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(shorts, shorts));
#elif defined(__SSE2__)
    const __m128i shorts = _mm_packs_epi32((__m128i)x, (__m128i)x);
    const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
    return load<Bytes>(&bytes);
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

// ---- pairs of registers ---------------------------------------------------------------------------------------------

// The even lanes of both, the odd lanes of both.
LMPIPE_INLINE FloatPair apart(FloatPair p) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {(Floats)_mm512_permutex2var_ps((__m512)p.a, even, (__m512)p.b),
            (Floats)_mm512_permutex2var_ps((__m512)p.a, odd, (__m512)p.b)};
#elif defined(__AVX2__)
    const __m256d even = (__m256d)_mm256_shuffle_ps((__m256)p.a, (__m256)p.b, 0x88);
    const __m256d odd = (__m256d)_mm256_shuffle_ps((__m256)p.a, (__m256)p.b, 0xDD);
    return {(Floats)_mm256_permute4x64_pd(even, 0xD8), (Floats)_mm256_permute4x64_pd(odd, 0xD8)};
#else
    return {LMPIPE_SHUFFLE4(p.a, p.b, 0, 2, 4, 6), LMPIPE_SHUFFLE4(p.a, p.b, 1, 3, 5, 7)};
#endif
}

// The inverse: lanes of the one between those of the other.
LMPIPE_INLINE FloatPair together(FloatPair p) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {(Floats)_mm512_permutex2var_ps((__m512)p.a, low, (__m512)p.b),
            (Floats)_mm512_permutex2var_ps((__m512)p.a, high, (__m512)p.b)};
#elif defined(__AVX2__)
    const __m256 low = _mm256_unpacklo_ps((__m256)p.a, (__m256)p.b);
    const __m256 high = _mm256_unpackhi_ps((__m256)p.a, (__m256)p.b);
    return {(Floats)_mm256_permute2f128_ps(low, high, 0x20), (Floats)_mm256_permute2f128_ps(low, high, 0x31)};
#else
    return {LMPIPE_SHUFFLE4(p.a, p.b, 0, 4, 1, 5), LMPIPE_SHUFFLE4(p.a, p.b, 2, 6, 3, 7)};
#endif
}

// ---- fp16 -----------------------------------------------------------------------------------------------------------

constexpr uint32_t HALF_INFINITY = 0x7C00;
constexpr uint32_t HALF_TOP = 0x7BFF;
constexpr float HALF_MAX = 65504.0f;

LMPIPE_INLINE Floats within_halves(Floats x) { return smaller(larger(x, all(-HALF_MAX)), all(HALF_MAX)); }

LMPIPE_INLINE Floats from_halves(Shorts halves) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
    const Words half = widened(halves);
    const Words magnitude = (half & 0x7FFF) << 13;
    Words bits = magnitude + (112u << 23);
    bits = choose((Ints)(magnitude >= (HALF_INFINITY << 13)), magnitude + (224u << 23), bits);
    // Below 2^-14: the bits of a sum with 2^-14, which is taken off again.
    const Words small = (Words)((Floats)(magnitude + (113u << 23)) - (Floats)all(113u << 23));
    bits = choose((Ints)(magnitude < (1u << 23)), small, bits);
    return (Floats)(bits | (half & 0x8000) << 16);
#endif
}

// To nearest even, of magnitudes of at most HALF_MAX.
LMPIPE_INLINE Shorts to_halves(Floats x) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Words magnitude = (Words)x & 0x7FFFFFFF;
    const Words normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const Words small = (Words)((Floats)magnitude + 0.5f) - 0x3F000000;  // one unit of 0.5 in the last place is 2^-24
    const Words half = choose((Ints)(magnitude < (113u << 23)), small, normal);
    return shorts_of(half | ((Words)x >> 16 & 0x8000));
#endif
}

// The largest fp16 that is at most x; minus infinity, or HALF_TOP, where x lies outside. No negative zeros, no NaN.
LMPIPE_INLINE Shorts halves_below(Floats x) {
    const Shorts nearest = to_halves(within_halves(x));
    const Words half = widened(nearest);
    // One step towards minus infinity: the magnitude of what is negative grows.
    const Words step = choose((Ints)((half & 0x8000) != 0), all(1u), all(~0u));
    const Words over = (Words)(from_halves(nearest) > x);
    return shorts_of(half + (over & step));
}

// The smallest fp16 that is at least x, which is not negative; infinity where there is none.
LMPIPE_INLINE Shorts halves_above(Floats x) {
    const Shorts nearest = to_halves(smaller(x, all(HALF_MAX)));
    const Words under = (Words)(from_halves(nearest) < x);
    return shorts_of(widened(nearest) - under);
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

// PAIR numbers: the even ones, the odd ones.
template <unsigned DTYPE>
LMPIPE_INLINE FloatPair load_apart(const uint8_t *from) {
    if constexpr (DTYPE == BF16) {
        const Words both = load<Words>(from);
        return {(Floats)(both << 16), (Floats)(both & 0xFFFF0000)};
    } else if constexpr (DTYPE == FP16) {
        return apart({from_halves(load<Shorts>(from)), from_halves(load<Shorts>(from + sizeof(Shorts)))});
    } else {
        return apart({load<Floats>(from), load<Floats>(from + sizeof(Floats))});
    }
}

LMPIPE_INLINE Words rounded_to_bf16(Floats x) { return (Words)x + 0x7FFF + ((Words)x >> 16 & 1); }

// The inverse. Numbers are finite; those too large for fp16 become its largest.
template <unsigned DTYPE>
LMPIPE_INLINE void store_together(uint8_t *to, FloatPair p) {
    if constexpr (DTYPE == BF16) {
        store(to, (rounded_to_bf16(p.b) & 0xFFFF0000) | rounded_to_bf16(p.a) >> 16);
    } else if constexpr (DTYPE == FP16) {
        p = together(p);
        store(to, to_halves(within_halves(p.a)));
        store(to + sizeof(Shorts), to_halves(within_halves(p.b)));
    } else {
        p = together(p);
        store(to, p.a);
        store(to + sizeof(Floats), p.b);
    }
}

// ---- rows of any length, in their order -----------------------------------------------------------------------------

constexpr size_t up_to(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// `row` has room for a multiple of PAIR; what is over is zero.
template <unsigned DTYPE>
LMPIPE_INLINE void load_row(const uint8_t *from, size_t n, float *row) {
    for (size_t i = 0; i < n; i += PAIR) {
        uint8_t last[PAIR * 4] = {};
        const bool whole = n - i >= PAIR;
        if (!whole) memcpy(last, from + i * ITEM_BYTES<DTYPE>, (n - i) * ITEM_BYTES<DTYPE>);
        const FloatPair p = together(load_apart<DTYPE>(whole ? from + i * ITEM_BYTES<DTYPE> : last));
        store(row + i, p.a);
        store(row + i + LANES, p.b);
    }
}

template <unsigned DTYPE>
LMPIPE_INLINE void store_row(uint8_t *to, size_t n, const float *row) {
    for (size_t i = 0; i < n; i += PAIR) {
        uint8_t last[PAIR * 4];
        const bool whole = n - i >= PAIR;
        store_together<DTYPE>(whole ? to + i * ITEM_BYTES<DTYPE> : last,
                              apart({load<Floats>(row + i), load<Floats>(row + i + LANES)}));
        if (!whole) memcpy(to + i * ITEM_BYTES<DTYPE>, last, (n - i) * ITEM_BYTES<DTYPE>);
    }
}

// ---- across the lanes -----------------------------------------------------------------------------------------------

// One number for each of LANES registers: lane i of the result is what `join` makes of the lanes of part[i].
template <typename Join>
LMPIPE_INLINE Floats joined(Floats part[LANES], Join join) {
    for (size_t n = LANES; n > 1; n /= 2) {
        for (size_t i = 0; i < n / 2; i++) {
            const FloatPair p = apart({part[2 * i], part[2 * i + 1]});
            part[i] = join(p.a, p.b);
        }
    }
    return part[0];
}

}  // namespace
