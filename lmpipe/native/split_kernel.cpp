// One block of the `split` codec: docs/decisions/0011-codec-formats.md has the picture.
//
// All goes by groups of 64 numbers, whose plane is one word and whose exponents are a few vectors. Exponents stay in an
// array of the block (4 KiB, in L1) between the passes: read and place the windows, count, write planes and escapes.
#include "kernels.h"
#include "vec.h"

namespace {

using lmpipe::SPLIT_GROUP;
using lmpipe::SPLIT_NUMBERS;
using lmpipe::SPLIT_RAW;
using lmpipe::SplitForm;
using lmpipe::SplitRow;

#if defined(__AVX512BW__)
constexpr size_t WIDTH = 64;
#elif defined(__AVX2__)
constexpr size_t WIDTH = 32;
#else
constexpr size_t WIDTH = 16;
#endif
constexpr size_t PARTS = SPLIT_GROUP / WIDTH;
constexpr size_t SAMPLED_GROUPS = 17;
constexpr size_t TOPS = 64;
constexpr size_t PREFETCH_BYTES = 8192;
constexpr unsigned MIN_BITS = 2, MAX_BITS = 4;

typedef uint8_t Part __attribute__((vector_size(WIDTH)));
typedef uint16_t Pairs __attribute__((vector_size(WIDTH)));

// The same for 64 numbers: a byte of each.
struct Lanes {
    Part part[PARTS];
};

LMPIPE_INLINE Part all(uint8_t value) { return (Part){} + value; }

LMPIPE_INLINE Part pick(Part a, Part b, Part where) { return (a & where) | (b & ~where); }

// Shifts of 16 bits are one instruction, those of 8 are not: the caller masks what the neighbour shifted in.
LMPIPE_INLINE Part shift_left(Part x, int by) { return (Part)((Pairs)x << by); }
LMPIPE_INLINE Part shift_right(Part x, int by) { return (Part)((Pairs)x >> by); }

LMPIPE_INLINE Part lesser(Part a, Part b) {
#if defined(__AVX512BW__)
    return (Part)_mm512_min_epu8((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Part)_mm256_min_epu8((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Part)_mm_min_epu8((__m128i)a, (__m128i)b);
#else
    return a < b ? a : b;
#endif
}

LMPIPE_INLINE Part greater(Part a, Part b) { return ~lesser(~a, ~b); }

LMPIPE_INLINE uint8_t highest_of(Part x) {
    uint8_t lane[WIDTH], highest = 0;
    memcpy(lane, &x, sizeof lane);
    for (size_t i = 0; i < WIDTH; i++) highest = lane[i] > highest ? lane[i] : highest;
    return highest;
}

// Adds one where x < limit.
LMPIPE_INLINE Part count_below(Part count, Part x, uint8_t limit) {
#if defined(__AVX512BW__)
    const __mmask64 below = _mm512_cmplt_epu8_mask((__m512i)x, (__m512i)all(limit));
    return (Part)_mm512_mask_add_epi8((__m512i)count, below, (__m512i)count, (__m512i)all(1));
#else
    return count - (Part)(lesser(x, all(limit - 1)) == x);
#endif
}

#if !defined(__SSE2__)
LMPIPE_INLINE uint64_t bits_of_word(uint64_t x, int bit) {
    return ((x >> bit & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
}
#endif

// Bit `bit` of every byte.
LMPIPE_INLINE uint64_t bits_of(Part x, int bit) {
#if defined(__AVX512BW__)
    return _mm512_test_epi8_mask((__m512i)x, (__m512i)all((uint8_t)(1 << bit)));
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_epi8((__m256i)shift_left(x, 7 - bit));
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_epi8((__m128i)shift_left(x, 7 - bit));
#else
    uint64_t word[2];
    memcpy(word, &x, sizeof word);
    return bits_of_word(word[0], bit) | bits_of_word(word[1], bit) << 8;
#endif
}

// `value` where a bit is set, else 0.
LMPIPE_INLINE Part spread(uint64_t bits, uint8_t value) {
#if defined(__AVX512BW__)
    return (Part)_mm512_maskz_mov_epi8(bits, (__m512i)all(value));
#elif defined(__AVX2__)
    const __m256i octets = _mm256_shuffle_epi8(_mm256_set1_epi32((int)(uint32_t)bits),
                                               _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i places = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(octets, places), places);
    return (Part)set & all(value);
#else
    typedef uint64_t Words __attribute__((vector_size(WIDTH)));
    const Words octets = {(bits & 0xFF) * 0x0101010101010101u, (bits >> 8 & 0xFF) * 0x0101010101010101u};
    const Part places = (Part)((Words){} + 0x8040201008040201u);
    return (Part)(((Part)octets & places) == places) & all(value);
#endif
}

#if defined(__AVX512VBMI__)
constexpr Part COUNTING = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                           22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                           44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
#endif

// Numbers of two bytes to their low and high bytes, and back.
LMPIPE_INLINE void part_pairs(const uint8_t *from, Part &low, Part &high) {
    [[maybe_unused]] const Pairs a = load<Pairs>(from), b = load<Pairs>(from + WIDTH);
#if defined(__AVX512VBMI__)
    low = (Part)_mm512_permutex2var_epi8((__m512i)a, (__m512i)(COUNTING + COUNTING), (__m512i)b);
    high = (Part)_mm512_permutex2var_epi8((__m512i)a, (__m512i)(COUNTING + COUNTING + 1), (__m512i)b);
#elif defined(__AVX512BW__)
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    low = (Part)_mm512_maskz_permutexvar_epi64(0xFF, order, _mm512_packus_epi16((__m512i)(a & 0xFF), (__m512i)(b & 0xFF)));
    high = (Part)_mm512_maskz_permutexvar_epi64(0xFF, order, _mm512_packus_epi16((__m512i)(a >> 8), (__m512i)(b >> 8)));
#elif defined(__AVX2__)
    low = (Part)_mm256_permute4x64_epi64(_mm256_packus_epi16((__m256i)(a & 0xFF), (__m256i)(b & 0xFF)), 0xD8);
    high = (Part)_mm256_permute4x64_epi64(_mm256_packus_epi16((__m256i)(a >> 8), (__m256i)(b >> 8)), 0xD8);
#elif defined(__SSE2__)
    low = (Part)_mm_packus_epi16((__m128i)(a & 0xFF), (__m128i)(b & 0xFF));
    high = (Part)_mm_packus_epi16((__m128i)(a >> 8), (__m128i)(b >> 8));
#elif defined(__ARM_NEON)
    low = (Part)vuzp1q_u8((uint8x16_t)a, (uint8x16_t)b);
    high = (Part)vuzp2q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
    for (size_t i = 0; i < WIDTH; i++) low[i] = from[2 * i], high[i] = from[2 * i + 1];
#endif
}

template <bool STREAM>
LMPIPE_INLINE void put(uint8_t *to, Part x) {
#if defined(__AVX512BW__)
    if (STREAM) return _mm512_stream_si512((__m512i *)to, (__m512i)x);
#elif defined(__AVX2__)
    if (STREAM) return _mm256_stream_si256((__m256i *)to, (__m256i)x);
#elif defined(__SSE2__)
    if (STREAM) return _mm_stream_si128((__m128i *)to, (__m128i)x);
#endif
    store(to, x);
}

LMPIPE_INLINE void join_pairs(Part low, Part high, Part &first, Part &second) {
#if defined(__AVX512BW__)
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i l = _mm512_maskz_permutexvar_epi64(0xFF, order, (__m512i)low);
    const __m512i h = _mm512_maskz_permutexvar_epi64(0xFF, order, (__m512i)high);
    first = (Part)_mm512_unpacklo_epi8(l, h);
    second = (Part)_mm512_unpackhi_epi8(l, h);
#elif defined(__AVX2__)
    const __m256i l = _mm256_permute4x64_epi64((__m256i)low, 0xD8), h = _mm256_permute4x64_epi64((__m256i)high, 0xD8);
    first = (Part)_mm256_unpacklo_epi8(l, h);
    second = (Part)_mm256_unpackhi_epi8(l, h);
#elif defined(__SSE2__)
    first = (Part)_mm_unpacklo_epi8((__m128i)low, (__m128i)high);
    second = (Part)_mm_unpackhi_epi8((__m128i)low, (__m128i)high);
#elif defined(__ARM_NEON)
    first = (Part)vzip1q_u8((uint8x16_t)low, (uint8x16_t)high);
    second = (Part)vzip2q_u8((uint8x16_t)low, (uint8x16_t)high);
#else
    for (size_t i = 0; i < WIDTH; i++) {
        uint8_t *to = (uint8_t *)(i < WIDTH / 2 ? &first : &second) + 2 * i % WIDTH;
        to[0] = low[i], to[1] = high[i];
    }
#endif
}

LMPIPE_INLINE uint64_t plane_of(const Lanes &x, int bit) {
    uint64_t bits = 0;
    for (size_t p = 0; p < PARTS; p++) bits |= bits_of(x.part[p], bit) << (p * WIDTH % 64);
    return bits;
}

LMPIPE_INLINE Lanes load_lanes(const uint8_t *from) {
    Lanes x;
    for (size_t p = 0; p < PARTS; p++) x.part[p] = load<Part>(from + p * WIDTH);
    return x;
}

// What a form does to a group: `numbers` are the group's own, `rest` is the block's, which has `groups` of them.
template <SplitForm FORM>
struct Numbers;

// The high half of a number with eight bits of exponent: s eeeeeeee mmmmmmm.
LMPIPE_INLINE void part_high(Part low, Part high, Part &exponent, Part &rest) {
    exponent = (high + high) | (shift_right(low, 7) & all(1));
    rest = pick(low, high, all(0x7F));
}

LMPIPE_INLINE void join_high(Part exponent, Part rest, Part &low, Part &high) {
    low = pick(rest, shift_left(exponent, 7), all(0x7F));
    high = pick(rest, shift_right(exponent, 1), all(0x80));
}

template <>
struct Numbers<SplitForm::bf16> {
    static constexpr size_t BYTES = 2, REST_BYTES = SPLIT_GROUP;

    LMPIPE_INLINE void part(const uint8_t *numbers, uint8_t *exponent, uint8_t *rest, size_t, size_t g) {
        for (size_t p = 0; p < PARTS; p++) {
            Part low, high, e, r;
            part_pairs(numbers + 2 * p * WIDTH, low, high);
            part_high(low, high, e, r);
            store(exponent + p * WIDTH, e);
            store(rest + g * SPLIT_GROUP + p * WIDTH, r);
        }
    }
    template <bool STREAM>
    LMPIPE_INLINE void join(uint8_t *numbers, const Lanes &exponent, const uint8_t *rest, size_t, size_t g) {
        for (size_t p = 0; p < PARTS; p++) {
            Part low, high, first, second;
            join_high(exponent.part[p], load<Part>(rest + g * SPLIT_GROUP + p * WIDTH), low, high);
            join_pairs(low, high, first, second);
            put<STREAM>(numbers + 2 * p * WIDTH, first);
            put<STREAM>(numbers + (2 * p + 1) * WIDTH, second);
        }
    }
};

// s eeeee mm, mmmmmmmm
template <>
struct Numbers<SplitForm::fp16> {
    static constexpr size_t BYTES = 2, REST_BYTES = SPLIT_GROUP + 3 * SPLIT_GROUP / 8;
    static constexpr int PLANE_BIT[3] = {0, 1, 7};

    LMPIPE_INLINE void part(const uint8_t *numbers, uint8_t *exponent, uint8_t *rest, size_t groups, size_t g) {
        Lanes high;
        for (size_t p = 0; p < PARTS; p++) {
            Part low;
            part_pairs(numbers + 2 * p * WIDTH, low, high.part[p]);
            store(exponent + p * WIDTH, shift_right(high.part[p], 2) & all(0x1F));
            store(rest + g * SPLIT_GROUP + p * WIDTH, low);
        }
        for (size_t b = 0; b < 3; b++) store(planes(rest, groups, b) + 8 * g, plane_of(high, PLANE_BIT[b]));
    }
    template <bool STREAM>
    LMPIPE_INLINE void join(uint8_t *numbers, const Lanes &exponent, const uint8_t *rest, size_t groups, size_t g) {
        uint64_t plane[3];
        for (size_t b = 0; b < 3; b++) plane[b] = load<uint64_t>(planes((uint8_t *)rest, groups, b) + 8 * g);
        for (size_t p = 0; p < PARTS; p++) {
            Part high = shift_left(exponent.part[p] & all(0x1F), 2), first, second;
            for (size_t b = 0; b < 3; b++) high |= spread(plane[b] >> (p * WIDTH % 64), (uint8_t)(1 << PLANE_BIT[b]));
            join_pairs(load<Part>(rest + g * SPLIT_GROUP + p * WIDTH), high, first, second);
            put<STREAM>(numbers + 2 * p * WIDTH, first);
            put<STREAM>(numbers + (2 * p + 1) * WIDTH, second);
        }
    }

   private:
    LMPIPE_INLINE uint8_t *planes(uint8_t *rest, size_t groups, size_t b) {
        return rest + groups * (SPLIT_GROUP + b * SPLIT_GROUP / 8);
    }
};

// The high halves as bf16, the low ones before them as they are.
template <>
struct Numbers<SplitForm::fp32> {
    static constexpr size_t BYTES = 4, REST_BYTES = 3 * SPLIT_GROUP;

    LMPIPE_INLINE void part(const uint8_t *numbers, uint8_t *exponent, uint8_t *rest, size_t groups, size_t g) {
        uint8_t low[2 * SPLIT_GROUP], high[2 * SPLIT_GROUP];
        for (size_t i = 0; i < SPLIT_GROUP; i++) {
            const auto number = load<uint32_t>(numbers + 4 * i);
            store(low + 2 * i, (uint16_t)number);
            store(high + 2 * i, (uint16_t)(number >> 16));
        }
        memcpy(rest + 2 * g * SPLIT_GROUP, low, sizeof low);
        Numbers<SplitForm::bf16>::part(high, exponent, rest + 2 * groups * SPLIT_GROUP, groups, g);
    }
    template <bool STREAM>
    LMPIPE_INLINE void join(uint8_t *numbers, const Lanes &exponent, const uint8_t *rest, size_t groups, size_t g) {
        uint8_t high[2 * SPLIT_GROUP];
        Numbers<SplitForm::bf16>::template join<false>(high, exponent, rest + 2 * groups * SPLIT_GROUP, groups, g);
        for (size_t i = 0; i < SPLIT_GROUP; i++) {
            const auto low = load<uint16_t>(rest + 2 * (g * SPLIT_GROUP + i));
            store(numbers + 4 * i, (uint32_t)low | (uint32_t)load<uint16_t>(high + 2 * i) << 16);
        }
    }
};

struct Windows {
    uint8_t top[MAX_BITS + 1];
};

// For each number of bits the window with most of the sampled numbers, among those whose top is the highest of these or up
// to 63 below; of equal ones the lowest.
Windows place_windows(const uint8_t *exponent, size_t groups, size_t pads) {
    Part most = {};
    for (size_t g = 0; g < groups; g += SAMPLED_GROUPS)
        for (size_t p = 0; p < PARTS; p++) most = greater(most, load<Part>(exponent + g * SPLIT_GROUP + p * WIDTH));
    const uint8_t highest = highest_of(most);
    // Four tables: an increment waits for the one before it if both are of one place.
    alignas(64) uint8_t below[SPLIT_GROUP], way[4][TOPS + 16] = {};
    for (size_t g = 0; g < groups; g += SAMPLED_GROUPS) {
        for (size_t p = 0; p < PARTS; p++) {
            const Part e = load<Part>(exponent + g * SPLIT_GROUP + p * WIDTH);
            store(below + p * WIDTH, lesser(all(highest) - e, all(TOPS + 15)));
        }
        for (size_t i = 0; i < SPLIT_GROUP; i += 4)
            for (size_t w = 0; w < 4; w++) way[w][below[i + w]]++;
    }
    if ((groups - 1) % SAMPLED_GROUPS == 0) {
        for (size_t i = SPLIT_GROUP - pads; i < SPLIT_GROUP; i++) way[i % 4][highest < TOPS + 15 ? highest : TOPS + 15]--;
    }
    alignas(64) uint16_t count[TOPS + 16], three[TOPS + 16], seven[TOPS + 8], fifteen[TOPS];
    for (size_t i = 0; i < TOPS + 16; i++) count[i] = (uint16_t)(way[0][i] + way[1][i] + way[2][i] + way[3][i]);
    for (size_t i = 0; i < TOPS + 12; i++) three[i] = (uint16_t)(count[i] + count[i + 1] + count[i + 2]);
    for (size_t i = 0; i < TOPS + 8; i++) seven[i] = (uint16_t)(three[i] + three[i + 3] + count[i + 6]);
    for (size_t i = 0; i < TOPS; i++) fifteen[i] = (uint16_t)(seven[i] + seven[i + 7] + count[i + 14]);
    Windows windows;
    const uint16_t *const inside[] = {three, seven, fifteen};
    for (unsigned bits = MIN_BITS; bits <= MAX_BITS; bits++) {
        uint16_t best = 0;
        for (size_t i = 0; i < TOPS; i++) {
            const auto rank = (uint16_t)(inside[bits - MIN_BITS][i] * TOPS + i);
            best = rank > best ? rank : best;
        }
        windows.top[bits] = (uint8_t)(highest - best % TOPS);
    }
    return windows;
}

// Counts the numbers of a block that lie in each window.
struct Inside {
    Part count[MAX_BITS + 1][PARTS] = {};

    void add(const uint8_t *exponent, const Windows &windows) {
        const Lanes e = load_lanes(exponent);
        for (unsigned bits = MIN_BITS; bits <= MAX_BITS; bits++)
            for (size_t p = 0; p < PARTS; p++)
                count[bits][p] = count_below(count[bits][p], all(windows.top[bits]) - e.part[p], (uint8_t)((1 << bits) - 1));
    }
    size_t sum(unsigned bits) const {
        uint8_t lanes[SPLIT_GROUP];
        memcpy(lanes, count[bits], sizeof lanes);
        size_t sum = 0;
        for (const uint8_t lane : lanes) sum += lane;
        return sum;
    }
};

#if !defined(__AVX512VBMI2__)
LMPIPE_INLINE size_t first_of(uint64_t bits) { return bits ? (size_t)__builtin_ctzll(bits) : 64; }
#endif

// Appends the exponents whose bit is set to `to`; returns its new end. Both write up to a group more than they have.
LMPIPE_INLINE uint8_t *put_escapes(const uint8_t *exponent, uint64_t escaped, uint8_t *to) {
#if defined(__AVX512VBMI2__)
    const __m512i found = _mm512_maskz_compress_epi8(escaped, _mm512_loadu_si512(exponent));
    const int n = __builtin_popcountll(escaped);
    memcpy(to, &found, 16);
    if (n > 16) _mm512_storeu_si512(to, found);  // seldom, and slow across lines
    return to + n;
#else
    // A group has few escapes, but seldom none, and a branch that nobody can foresee costs more than four steps of which
    // some do nothing.
    for (int k = 0; k < 4; k++, to += escaped != 0, escaped &= escaped - 1) *to = exponent[first_of(escaped)];
    for (; escaped; escaped &= escaped - 1) *to++ = exponent[first_of(escaped)];
    return to;
#endif
}

// The inverse; returns where the next group's begin.
LMPIPE_INLINE const uint8_t *take_escapes(uint8_t *exponent, uint64_t escaped, const uint8_t *from) {
#if defined(__AVX512VBMI2__)
    _mm512_storeu_si512(exponent, _mm512_mask_expand_epi8(_mm512_loadu_si512(exponent), escaped, _mm512_loadu_si512(from)));
    return from + __builtin_popcountll(escaped);
#else
    for (int k = 0; k < 4; k++, from += escaped != 0, escaped &= escaped - 1) exponent[first_of(escaped)] = *from;
    for (; escaped; escaped &= escaped - 1) exponent[first_of(escaped)] = *from++;
    return from;
#endif
}

template <unsigned BITS>
void write_codes(const uint8_t *exponent, size_t groups, uint8_t top, uint8_t *planes) {
    uint8_t *escapes = planes + BITS * groups * SPLIT_GROUP / 8;
    for (size_t g = 0; g < groups; g++) {
        const uint8_t *group = exponent + g * SPLIT_GROUP;
        Lanes code = load_lanes(group);
        for (Part &part : code.part) part = lesser(all(top) - part, all((1 << BITS) - 1));
        uint64_t escaped = ~(uint64_t)0;
        for (unsigned b = 0; b < BITS; b++) {
            const uint64_t plane = plane_of(code, (int)b);
            store(planes + (b * groups + g) * 8, plane);
            escaped &= plane;
        }
        escapes = put_escapes(group, escaped, escapes);
    }
}

template <unsigned BITS>
bool read_codes(const uint8_t *planes, size_t groups, uint8_t top, const uint8_t *escapes, size_t n, uint8_t *exponent) {
    const uint8_t *const end = escapes + n;
    for (size_t g = 0; g < groups; g++) {
        uint8_t *group = exponent + g * SPLIT_GROUP;
        uint64_t plane[BITS], escaped = ~(uint64_t)0;
        for (unsigned b = 0; b < BITS; b++) {
            plane[b] = load<uint64_t>(planes + (b * groups + g) * 8);
            escaped &= plane[b];
        }
        for (size_t p = 0; p < PARTS; p++) {
            Part e = all(top);
            for (unsigned b = 0; b < BITS; b++) e -= spread(plane[b] >> (p * WIDTH % 64), (uint8_t)(1 << b));
            store(group + p * WIDTH, e);
        }
        escapes = take_escapes(group, escaped, escapes);
    }
    return escapes == end;
}

template <SplitForm FORM>
SplitRow encode(const uint8_t *numbers, size_t groups, size_t pads, uint8_t *block) {
    using Form = Numbers<FORM>;
    constexpr size_t GROUP_BYTES = SPLIT_GROUP * Form::BYTES;
    alignas(64) uint8_t exponent[SPLIT_NUMBERS + SPLIT_GROUP];
    exponent[groups * SPLIT_GROUP] = 0;
    for (size_t g = 0; g < groups; g += SAMPLED_GROUPS)
        Form::part(numbers + g * GROUP_BYTES, exponent + g * SPLIT_GROUP, block, groups, g);
    const Windows windows = place_windows(exponent, groups, pads);
    Inside inside;
    for (size_t g = 0; g < groups; g++) {
        const uint8_t *group = numbers + g * GROUP_BYTES;
        for (size_t line = 0; line < GROUP_BYTES; line += 64) __builtin_prefetch(group + PREFETCH_BYTES + line, 0, 2);
        Form::part(group, exponent + g * SPLIT_GROUP, block, groups, g);
        inside.add(exponent + g * SPLIT_GROUP, windows);
    }
    const size_t n = groups * SPLIT_GROUP - pads, plane_bytes = (n + 7) / 8;
    const size_t rest_bytes = FORM == SplitForm::fp16 ? n + 3 * plane_bytes : (Form::BYTES - 1) * n;
    SplitRow row{0, 0, SPLIT_RAW, 0};
    for (size_t bits = MIN_BITS, least = n * Form::BYTES; bits <= MAX_BITS; bits++) {
        const size_t pads_inside = windows.top[bits] < (1u << bits) - 1 ? pads : 0;
        const size_t escapes = n - (inside.sum((unsigned)bits) - pads_inside);
        const size_t bytes = rest_bytes + bits * plane_bytes + escapes;
        if (bytes >= least) continue;
        least = bytes;
        row = {0, windows.top[bits], (uint8_t)bits, (uint16_t)escapes};
    }
    uint8_t *planes = block + groups * Form::REST_BYTES;
    if (row.bits == 2) write_codes<2>(exponent, groups, row.top, planes);
    if (row.bits == 3) write_codes<3>(exponent, groups, row.top, planes);
    if (row.bits == 4) write_codes<4>(exponent, groups, row.top, planes);
    return row;
}

template <SplitForm FORM, bool STREAM>
void join(const uint8_t *block, size_t groups, const uint8_t *exponent, uint8_t *numbers) {
    for (size_t g = 0; g < groups; g++) {
        const Lanes e = load_lanes(exponent + g * SPLIT_GROUP);
        Numbers<FORM>::template join<STREAM>(numbers + g * SPLIT_GROUP * Numbers<FORM>::BYTES, e, block, groups, g);
    }
}

template <SplitForm FORM>
bool decode(const uint8_t *block, const uint8_t *escapes, size_t groups, SplitRow row, uint8_t *numbers, bool stream) {
    alignas(64) uint8_t exponent[SPLIT_NUMBERS + SPLIT_GROUP];
    const uint8_t *planes = block + groups * Numbers<FORM>::REST_BYTES;
    const size_t block_bytes = groups * (Numbers<FORM>::REST_BYTES + row.bits * SPLIT_GROUP / 8) + row.escapes;
    for (size_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(block + block_bytes + line, 0, 2);
    if (!(row.bits == 2   ? read_codes<2>(planes, groups, row.top, escapes, row.escapes, exponent)
          : row.bits == 3 ? read_codes<3>(planes, groups, row.top, escapes, row.escapes, exponent)
                          : read_codes<4>(planes, groups, row.top, escapes, row.escapes, exponent)))
        return false;
    if (stream)
        join<FORM, true>(block, groups, exponent, numbers);
    else
        join<FORM, false>(block, groups, exponent, numbers);
    return true;
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

SplitRow split_encode(SplitForm form, const uint8_t *numbers, size_t groups, size_t pads, uint8_t *block) {
    if (form == SplitForm::bf16) return encode<SplitForm::bf16>(numbers, groups, pads, block);
    if (form == SplitForm::fp16) return encode<SplitForm::fp16>(numbers, groups, pads, block);
    return encode<SplitForm::fp32>(numbers, groups, pads, block);
}

bool split_decode(SplitForm form, const uint8_t *block, const uint8_t *escapes, size_t groups, SplitRow row, uint8_t *numbers,
                  bool stream) {
    if (form == SplitForm::bf16) return decode<SplitForm::bf16>(block, escapes, groups, row, numbers, stream);
    if (form == SplitForm::fp16) return decode<SplitForm::fp16>(block, escapes, groups, row, numbers, stream);
    return decode<SplitForm::fp32>(block, escapes, groups, row, numbers, stream);
}

}  // namespace lmpipe::LMPIPE_LEVEL
