// Codes of some bits between a byte each and bit planes: `bits` planes of (n + 7) / 8 bytes, bit i of a plane being one
// bit of code i, least significant plane first. What is over in a plane's last byte is zero.
//
// The bytes of codes have room up to a multiple of PLANE_CODES; put_planes wants zeros there, take_planes fills it.
#pragma once

#include "vec.h"

namespace {

constexpr size_t PLANE_CODES = 64;

// Plane `b` of 64 codes.
LMPIPE_INLINE uint64_t plane_of(const uint8_t *codes, unsigned b) {
#if defined(__AVX512BW__)
    return _mm512_test_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8((char)(1u << b)));
#elif defined(__AVX2__)
    uint64_t word = 0;
    for (int part = 1; part >= 0; part--) {
        const __m256i raised = _mm256_slli_epi16(load<__m256i>(codes + 32 * part), (int)(7 - b));
        word = word << 32 | (uint32_t)_mm256_movemask_epi8(raised);
    }
    return word;
#elif defined(__SSE2__)
    uint64_t word = 0;
    for (int part = 3; part >= 0; part--) {
        const __m128i raised = _mm_slli_epi16(load<__m128i>(codes + 16 * part), (int)(7 - b));
        word = word << 16 | (uint32_t)_mm_movemask_epi8(raised);
    }
    return word;
#else
    // The product moves the lowest bit of byte i to bit 56 + i.
    uint64_t word = 0;
    for (int part = 7; part >= 0; part--) {
        const uint64_t lowest = load<uint64_t>(codes + 8 * part) >> b & 0x0101010101010101u;
        word = word << 8 | (lowest * 0x0102040810204080u) >> 56;
    }
    return word;
#endif
}

// 64 codes from their planes, one word each.
template <unsigned BITS>
LMPIPE_INLINE void codes_of(const uint64_t words[BITS], uint8_t *codes) {
#if defined(__AVX512BW__)
    __m512i all = _mm512_setzero_si512();
    for (unsigned b = 0; b < BITS; b++) all = _mm512_mask_add_epi8(all, words[b], all, _mm512_set1_epi8((char)(1u << b)));
    _mm512_storeu_si512(codes, all);
#elif defined(__AVX2__)
    const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    for (int part = 0; part < 2; part++) {
        __m256i all = _mm256_setzero_si256();
        for (unsigned b = 0; b < BITS; b++) {
            const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32((int)(words[b] >> 32 * part)), source);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit);
            all = _mm256_or_si256(all, _mm256_and_si256(set, _mm256_set1_epi8((char)(1u << b))));
        }
        store(codes + 32 * part, all);
    }
#else
    // Byte i of `set` keeps bit i of the plane's byte; adding 0x7f raises it to the top of its byte.
    for (int part = 0; part < 8; part++) {
        uint64_t all = 0;
        for (unsigned b = 0; b < BITS; b++) {
            const uint64_t set = (words[b] >> 8 * part & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
            all |= ((set + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u) << b;
        }
        store(codes + 8 * part, all);
    }
#endif
}

template <unsigned BITS>
LMPIPE_INLINE void put_planes(const uint8_t *codes, size_t n, uint8_t *out) {
    const size_t plane_bytes = (n + 7) / 8;
    for (size_t at = 0; at < plane_bytes; at += 8) {
        const size_t bytes = plane_bytes - at;
        for (unsigned b = 0; b < BITS; b++) {
            const uint64_t word = plane_of(codes + 8 * at, b);
            if (bytes >= 8) store(out + b * plane_bytes + at, word);
            else memcpy(out + b * plane_bytes + at, &word, bytes);
        }
    }
}

template <unsigned BITS>
LMPIPE_INLINE void take_planes(const uint8_t *planes, size_t n, uint8_t *codes) {
    const size_t plane_bytes = (n + 7) / 8;
    for (size_t at = 0; at < plane_bytes; at += 8) {
        const size_t bytes = plane_bytes - at;
        uint64_t words[BITS] = {};
        for (unsigned b = 0; b < BITS; b++) {
            if (bytes >= 8) words[b] = load<uint64_t>(planes + b * plane_bytes + at);
            else memcpy(&words[b], planes + b * plane_bytes + at, bytes);
        }
        codes_of<BITS>(words, codes + 8 * at);
    }
}

}  // namespace
