// BLAKE3 in two shapes: many equal-length items, one per SIMD lane; and a chain of single blocks, where only the latency
// of one compression counts and a vector holds a row of the state. After the BLAKE3 paper (O'Connor, Aumasson, Neves,
// Wilcox-O'Hearn, 2020), sections 2.1 to 2.5.
#include "kernels.h"
#include "vec.h"

namespace {

constexpr uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

constexpr uint32_t CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED_HASH = 16;

constexpr size_t BLOCK_BYTES = 64;
constexpr size_t CHUNK_BYTES = 1024;
constexpr size_t MAX_DEPTH = 54;  // 2^54 chunks of 1 KiB: every length that fits in 64 bits

struct Schedule {
    unsigned char word[7][16];
};

// The words that each round reads: round 0 in order, each later one permuted once more.
constexpr Schedule make_schedule() {
    constexpr unsigned char permutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
    Schedule s{};
    for (unsigned i = 0; i < 16; i++) s.word[0][i] = (unsigned char)i;
    for (unsigned r = 1; r < 7; r++)
        for (unsigned i = 0; i < 16; i++) s.word[r][i] = s.word[r - 1][permutation[i]];
    return s;
}
constexpr Schedule SCHEDULE = make_schedule();

// ---- vectors across items -------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr size_t LANES = 16;
#elif defined(__AVX2__)
constexpr size_t LANES = 8;
#else
constexpr size_t LANES = 4;
#endif
typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));
typedef uint64_t Lanes64 __attribute__((vector_size(4 * LANES)));

template <int bits>
LMPIPE_INLINE Lanes rotate_right(Lanes x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_ror_epi32((__m512i)x, bits);
#elif defined(__AVX2__)
    // Whole bytes move in one shuffle; the others take two shifts and an or.
    if constexpr (bits == 16 || bits == 8) {
        constexpr int b = bits / 8;
        const __m256i order = _mm256_setr_epi8(b, (b + 1) % 4, (b + 2) % 4, (b + 3) % 4, 4 + b, 4 + (b + 1) % 4, 4 + (b + 2) % 4,
                                               4 + (b + 3) % 4, 8 + b, 8 + (b + 1) % 4, 8 + (b + 2) % 4, 8 + (b + 3) % 4, 12 + b,
                                               12 + (b + 1) % 4, 12 + (b + 2) % 4, 12 + (b + 3) % 4, b, (b + 1) % 4, (b + 2) % 4,
                                               (b + 3) % 4, 4 + b, 4 + (b + 1) % 4, 4 + (b + 2) % 4, 4 + (b + 3) % 4, 8 + b,
                                               8 + (b + 1) % 4, 8 + (b + 2) % 4, 8 + (b + 3) % 4, 12 + b, 12 + (b + 1) % 4,
                                               12 + (b + 2) % 4, 12 + (b + 3) % 4);
        return (Lanes)_mm256_shuffle_epi8((__m256i)x, order);
    }
#endif
    return (x >> bits) | (x << (32 - bits));
}

// Row j of four: the 16 bytes at `offset` of items j, j+4, j+8, ... side by side.
LMPIPE_INLINE Lanes load_row(const uint8_t *const item[], size_t j, size_t offset) {
#if defined(__AVX512F__)
    __m512i row = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(item[j] + offset)));
    row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i *)(item[j + 4] + offset)), 1);
    row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i *)(item[j + 8] + offset)), 2);
    row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i *)(item[j + 12] + offset)), 3);
    return (Lanes)row;
#elif defined(__AVX2__)
    __m256i row = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(item[j] + offset)));
    return (Lanes)_mm256_inserti128_si256(row, _mm_loadu_si128((const __m128i *)(item[j + 4] + offset)), 1);
#else
    return load<Lanes>(item[j] + offset);
#endif
}

// Interleaves words (or pairs of words) of a and b within each 128-bit part.
LMPIPE_INLINE void interleave(Lanes a, Lanes b, Lanes &low, Lanes &high) {
#if defined(__AVX512F__)
    low = (Lanes)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
    high = (Lanes)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    low = (Lanes)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
    high = (Lanes)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
#else
    low = LMPIPE_SHUFFLE4(a, b, 0, 4, 1, 5);
    high = LMPIPE_SHUFFLE4(a, b, 2, 6, 3, 7);
#endif
}

LMPIPE_INLINE void interleave_pairs(Lanes a, Lanes b, Lanes &low, Lanes &high) {
#if defined(__AVX512F__)
    low = (Lanes)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    high = (Lanes)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    low = (Lanes)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    high = (Lanes)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    low = LMPIPE_SHUFFLE4(a, b, 0, 1, 4, 5);
    high = LMPIPE_SHUFFLE4(a, b, 2, 3, 6, 7);
#endif
}

// Transposes: words[w] lane i = word w of item i's block. Items 4g..4g+3 sit in the 128-bit part g, whence load_row.
LMPIPE_INLINE void load_block(const uint8_t *const item_by_row[], size_t offset, Lanes words[16]) {
    for (size_t quad = 0; quad < 4; quad++) {
        Lanes row[4], low[2], high[2];
        for (size_t j = 0; j < 4; j++) row[j] = load_row(item_by_row, j, offset + 16 * quad);
        interleave(row[0], row[1], low[0], high[0]);
        interleave(row[2], row[3], low[1], high[1]);
        interleave_pairs(low[0], low[1], words[4 * quad], words[4 * quad + 1]);
        interleave_pairs(high[0], high[1], words[4 * quad + 2], words[4 * quad + 3]);
    }
}

LMPIPE_INLINE void quarter(Lanes &a, Lanes &b, Lanes &c, Lanes &d, Lanes x, Lanes y) {
    a += b + x;
    d = rotate_right<16>(d ^ a);
    c += d;
    b = rotate_right<12>(b ^ c);
    a += b + y;
    d = rotate_right<8>(d ^ a);
    c += d;
    b = rotate_right<7>(b ^ c);
}

template <int r>
LMPIPE_INLINE void lane_round(Lanes v[16], const Lanes m[16]) {
    constexpr auto &s = SCHEDULE.word[r];
    quarter(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    quarter(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    quarter(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    quarter(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    quarter(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    quarter(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    quarter(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    quarter(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
}

// The counter is one for all lanes: the items have the same length, so their trees have the same shape.
void compress_lanes(Lanes cv[8], const Lanes m[16], uint64_t counter, uint32_t block_bytes, uint32_t flags) {
    const Lanes zero = {};
    Lanes v[16];
    for (int i = 0; i < 8; i++) v[i] = cv[i];
    for (int i = 0; i < 4; i++) v[8 + i] = zero + IV[i];
    v[12] = zero + (uint32_t)counter;
    v[13] = zero + (uint32_t)(counter >> 32);
    v[14] = zero + block_bytes;
    v[15] = zero + flags;
    lane_round<0>(v, m);
    lane_round<1>(v, m);
    lane_round<2>(v, m);
    lane_round<3>(v, m);
    lane_round<4>(v, m);
    lane_round<5>(v, m);
    lane_round<6>(v, m);
    for (int i = 0; i < 8; i++) cv[i] = v[i] ^ v[8 + i];
}

void chunk_values(const uint8_t *const item[LANES], size_t start, size_t bytes, uint64_t counter, uint32_t root, Lanes cv[8]) {
    const Lanes zero = {};
    for (int i = 0; i < 8; i++) cv[i] = zero + IV[i];
    Lanes words[16];
    uint32_t flags = CHUNK_START;
    size_t offset = 0;
    for (; bytes - offset > BLOCK_BYTES; offset += BLOCK_BYTES) {
        load_block(item, start + offset, words);
        compress_lanes(cv, words, counter, BLOCK_BYTES, flags);
        flags = 0;
    }
    const size_t last = bytes - offset;  // 0 only for the empty item
    if (last == BLOCK_BYTES) {
        load_block(item, start + offset, words);
    } else {
        uint8_t padded[LANES][BLOCK_BYTES] = {};
        const uint8_t *pointers[LANES];
        for (size_t i = 0; i < LANES; i++) {
            if (last) memcpy(padded[i], item[i] + start + offset, last);
            pointers[i] = padded[i];
        }
        load_block(pointers, 0, words);
    }
    compress_lanes(cv, words, counter, (uint32_t)last, flags | CHUNK_END | root);
}

LMPIPE_INLINE void parent_values(const Lanes left[8], Lanes right_then_out[8], uint32_t root) {
    const Lanes zero = {};
    Lanes words[16];
    for (int i = 0; i < 8; i++) words[i] = left[i];
    for (int i = 0; i < 8; i++) words[8 + i] = right_then_out[i];
    for (int i = 0; i < 8; i++) right_then_out[i] = zero + IV[i];
    compress_lanes(right_then_out, words, 0, BLOCK_BYTES, PARENT | root);
}

// The items' lane order of load_row: row j, part g is item 4g + j, which is lane 4g + j again after the transposition.
void hash_lanes(const uint8_t *const item[LANES], size_t item_bytes, Lanes cv[8]) {
    Lanes stack[MAX_DEPTH][8];
    size_t depth = 0;
    const uint64_t chunks = item_bytes ? (item_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES : 1;
    for (uint64_t c = 0; c + 1 < chunks; c++) {
        chunk_values(item, c * CHUNK_BYTES, CHUNK_BYTES, c, 0, cv);
        // A subtree is complete when the count of chunks so far ends in zeros, one merge for each of them.
        for (uint64_t total = c + 1; !(total & 1); total >>= 1) parent_values(stack[--depth], cv, 0);
        memcpy(stack[depth++], cv, sizeof stack[0]);
    }
    const size_t start = (size_t)(chunks - 1) * CHUNK_BYTES;
    chunk_values(item, start, item_bytes - start, chunks - 1, chunks == 1 ? ROOT : 0, cv);
    while (depth) {
        depth--;
        parent_values(stack[depth], cv, depth ? 0 : ROOT);
    }
}

// ---- one block at a time --------------------------------------------------------------------------------------------

template <int bits>
LMPIPE_INLINE U32x4 rotate_row(U32x4 x) {
#if defined(__AVX512VL__)
    return (U32x4)_mm_ror_epi32((__m128i)x, bits);
#elif defined(__SSSE3__)
    if constexpr (bits == 16)
        return (U32x4)_mm_shuffle_epi8((__m128i)x, _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    if constexpr (bits == 8)
        return (U32x4)_mm_shuffle_epi8((__m128i)x, _mm_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12));
#endif
    return (x >> bits) | (x << (32 - bits));
}

struct Rows {
    U32x4 a, b, c, d;
};

LMPIPE_INLINE void half_quarter(Rows &v, U32x4 x, bool first) {
    v.a += x;
    v.a += v.b;
    v.d ^= v.a;
    v.d = first ? rotate_row<16>(v.d) : rotate_row<8>(v.d);
    v.c += v.d;
    v.b ^= v.c;
    v.b = first ? rotate_row<12>(v.b) : rotate_row<7>(v.b);
}

// One round: columns, then diagonals. The rows turn so that diagonals stand as columns; b, which is written last and
// needed first, is the one left in place, so the message of the diagonals is kept turned too (see message_next).
LMPIPE_INLINE void row_round(Rows &v, const U32x4 m[4]) {
    half_quarter(v, m[0], true);
    half_quarter(v, m[1], false);
    v.a = LMPIPE_SHUFFLE4(v.a, v.a, 3, 0, 1, 2);
    v.d = LMPIPE_SHUFFLE4(v.d, v.d, 2, 3, 0, 1);
    v.c = LMPIPE_SHUFFLE4(v.c, v.c, 1, 2, 3, 0);
    half_quarter(v, LMPIPE_SHUFFLE4(m[2], m[2], 3, 0, 1, 2), true);
    half_quarter(v, LMPIPE_SHUFFLE4(m[3], m[3], 3, 0, 1, 2), false);
    v.a = LMPIPE_SHUFFLE4(v.a, v.a, 1, 2, 3, 0);
    v.d = LMPIPE_SHUFFLE4(v.d, v.d, 2, 3, 0, 1);
    v.c = LMPIPE_SHUFFLE4(v.c, v.c, 3, 0, 1, 2);
}

// The permutation of the message, on four vectors that hold words (0,2,4,6) (1,3,5,7) (8,10,12,14) (9,11,13,15).
LMPIPE_INLINE void message_next(U32x4 m[4]) {
    const U32x4 a = m[0], b = m[1], c = m[2], d = m[3];
    m[0] = LMPIPE_SHUFFLE4(a, b, 1, 5, 7, 2);       // words 2 3 7 4
    const U32x4 ca = LMPIPE_SHUFFLE4(c, a, 1, 4, 7, 0);   // 10 0 6 .
    m[1] = LMPIPE_SHUFFLE4(ca, d, 2, 0, 1, 6);      // 6 10 0 13
    const U32x4 bc = LMPIPE_SHUFFLE4(b, c, 0, 6, 2, 7);   // 1 12 5 14
    m[2] = LMPIPE_SHUFFLE4(bc, d, 0, 1, 4, 7);      // 1 12 9 15
    const U32x4 dc = LMPIPE_SHUFFLE4(d, c, 1, 4, 1, 4);   // 11 8 . .
    m[3] = LMPIPE_SHUFFLE4(dc, bc, 0, 6, 7, 1);     // 11 5 14 8
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

extern const unsigned blake3_lanes = LANES;

void blake3_many(const uint8_t *items, size_t n, size_t item_bytes, uint8_t *out) {
    for (size_t base = 0; base < n; base += LANES) {
        const size_t live = n - base < LANES ? n - base : LANES;
        // Lanes past the end repeat the last item: same cost, nothing read out of bounds.
        const uint8_t *item[LANES];
        for (size_t i = 0; i < LANES; i++) item[i] = items + (base + (i < live ? i : live - 1)) * item_bytes;
        Lanes cv[8];
        hash_lanes(item, item_bytes, cv);
        uint32_t words[8][LANES];
        memcpy(words, cv, sizeof words);
        for (size_t i = 0; i < live; i++)
            for (size_t w = 0; w < 8; w++) store<uint32_t>(out + (base + i) * 32 + w * 4, words[w][i]);
    }
}

void blake3_chain(const uint8_t key[32], const uint8_t parent[16], const uint8_t *content, size_t n, uint8_t *out) {
    const U32x4 key_low = load<U32x4>(key), key_high = load<U32x4>(key + 16);
    const U32x4 iv = {IV[0], IV[1], IV[2], IV[3]}, zero = {};
    const U32x4 tail = {0, 0, 48, CHUNK_START | CHUNK_END | ROOT | KEYED_HASH};
    U32x4 previous = load<U32x4>(parent);
    for (size_t i = 0; i < n; i++) {
        // Block: 16 bytes of the key before, 32 bytes of content, 16 of padding.
        const U32x4 low = load<U32x4>(content + 32 * i), high = load<U32x4>(content + 32 * i + 16);
        U32x4 m[4] = {LMPIPE_SHUFFLE4(previous, low, 0, 2, 4, 6), LMPIPE_SHUFFLE4(previous, low, 1, 3, 5, 7),
                      LMPIPE_SHUFFLE4(high, zero, 0, 2, 4, 6), LMPIPE_SHUFFLE4(high, zero, 1, 3, 5, 7)};
        Rows v = {key_low, key_high, iv, tail};
        for (int r = 0; r < 6; r++) {
            row_round(v, m);
            message_next(m);
        }
        row_round(v, m);
        previous = v.a ^ v.c;
        store(out + 16 * i, previous);
    }
}

}  // namespace lmpipe::LMPIPE_LEVEL
