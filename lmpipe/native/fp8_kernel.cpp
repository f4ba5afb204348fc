// Vectors of numbers as e4m3 codes, each with a power of two for the vector: the codec `fp8`.
//
//     number = e4m3(code) * 2^(exponent - 127), exponent = 0: all numbers are zero
//
// LANES vectors at a time, so that their exponents are found side by side.
#include "kernels.h"
#include "numbers.h"

namespace {

constexpr uint32_t MAGNITUDE = 0x7FFFFFFF, INFINITE = 0x7F800000;

// What e4m3 makes of 464 is still its largest number, 448 = 1.75 * 2^8; 464 is 1.8125 * 2^8. Adding this to the bits of
// a magnitude over 1.8125 * 2^n carries into the exponent.
constexpr uint32_t OVER_464 = 0x7FFFFF - 0x680000;

// In fp32 of the smallest normal e4m3, 2^-6. Below it codes are multiples of 2^-9: the unit of 2^14 in the last place.
constexpr uint32_t SMALLEST_NORMAL = 121u << 23;
constexpr float SMALL_UNIT = 16384.0f;

// Codes in the low bytes, from |x| <= 464.
LMPIPE_INLINE Words to_e4m3(Floats x) {
    const Words magnitude = (Words)x & MAGNITUDE;
    const Words normal = (magnitude - (120u << 23) + 0x7FFFF + (magnitude >> 20 & 1)) >> 20;
    const Words small = (Words)((Floats)magnitude + SMALL_UNIT) & 0xFF;
    return choose((Ints)(magnitude < SMALLEST_NORMAL), small, normal) | ((Words)x >> 24 & 0x80);
}

// The bits of an fp16 that is 2^-8 of what a code says: same exponents, one bias of 7, one of 15.
LMPIPE_INLINE Shorts half_of_low(Shorts codes) { return (codes << 7 & 0x3F80) | (codes << 8 & 0x8000); }
LMPIPE_INLINE Shorts half_of_high(Shorts codes) { return (codes >> 1 & 0x3F80) | (codes & 0x8000); }

template <unsigned DTYPE>
LMPIPE_INLINE Words largest_of_pair(const uint8_t *from) {
    const FloatPair p = load_apart<DTYPE>(from);
    return larger_word((Words)p.a & MAGNITUDE, (Words)p.b & MAGNITUDE);
}

template <unsigned DTYPE>
LMPIPE_INLINE void encode_pair(const uint8_t *from, Floats factor, uint8_t *codes) {
    const FloatPair p = load_apart<DTYPE>(from);
    store(codes, shorts_of(to_e4m3(p.a * factor) | to_e4m3(p.b * factor) << 8));
}

template <unsigned DTYPE, bool LIMITED>
LMPIPE_INLINE void decode_pair(const uint8_t *codes, Floats factor, uint8_t *to) {
    const Shorts both = load<Shorts>(codes);
    const Floats limit = (Floats)all(DTYPE == BF16 ? 0x7F7F0000u : 0x7F7FFFFFu), unit = all(256.0f);
    FloatPair p = {from_halves(half_of_low(both)) * unit * factor, from_halves(half_of_high(both)) * unit * factor};
    if (LIMITED) p = {smaller(larger(p.a, -limit), limit), smaller(larger(p.b, -limit), limit)};
    store_together<DTYPE>(to, p);
}

// ---- vectors --------------------------------------------------------------------------------------------------------

template <unsigned DTYPE>
LMPIPE_INLINE Words largest_of_vector(const uint8_t *from, size_t dim) {
    Words largest = {};
    size_t i = 0;
    for (; i + PAIR <= dim; i += PAIR) largest = larger_word(largest, largest_of_pair<DTYPE>(from + i * ITEM_BYTES<DTYPE>));
    if (i == dim) return largest;
    uint8_t rest[PAIR * 4] = {};
    memcpy(rest, from + i * ITEM_BYTES<DTYPE>, (dim - i) * ITEM_BYTES<DTYPE>);
    return larger_word(largest, largest_of_pair<DTYPE>(rest));
}

template <unsigned DTYPE>
LMPIPE_INLINE void encode_vector(const uint8_t *from, size_t dim, uint32_t exponent, uint8_t *codes) {
    const Floats factor = (Floats)all((254 - exponent) << 23);
    size_t i = 0;
    for (; i + PAIR <= dim; i += PAIR) encode_pair<DTYPE>(from + i * ITEM_BYTES<DTYPE>, factor, codes + i);
    if (i == dim) return;
    uint8_t rest[PAIR * 4] = {}, rest_codes[PAIR];
    memcpy(rest, from + i * ITEM_BYTES<DTYPE>, (dim - i) * ITEM_BYTES<DTYPE>);
    encode_pair<DTYPE>(rest, factor, rest_codes);
    memcpy(codes + i, rest_codes, dim - i);
}

template <unsigned DTYPE, bool LIMITED>
LMPIPE_INLINE void decode_vector(const uint8_t *codes, size_t dim, uint32_t exponent, uint8_t *to) {
    const Floats factor = (Floats)all(exponent << 23);
    size_t i = 0;
    for (; i + PAIR <= dim; i += PAIR) decode_pair<DTYPE, LIMITED>(codes + i, factor, to + i * ITEM_BYTES<DTYPE>);
    if (i == dim) return;
    uint8_t rest[PAIR * 4], rest_codes[PAIR] = {};
    memcpy(rest_codes, codes + i, dim - i);
    decode_pair<DTYPE, LIMITED>(rest_codes, factor, rest);
    memcpy(to + i * ITEM_BYTES<DTYPE>, rest, (dim - i) * ITEM_BYTES<DTYPE>);
}

// ---- all ------------------------------------------------------------------------------------------------------------

template <unsigned DTYPE>
LMPIPE_INLINE bool encode(const uint8_t *from, size_t n, size_t dim, uint8_t *exponents, uint8_t *codes) {
    const size_t vector_bytes = dim * ITEM_BYTES<DTYPE>;
    Floats part[LANES] = {};  // beyond the last vector there are those of LANES vectors before
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        for (size_t v = 0; v < live; v++) {
            part[v] = (Floats)largest_of_vector<DTYPE>(from + (first + v) * vector_bytes, dim);
        }
        const Words largest = (Words)joined(part, [](Floats a, Floats b) { return (Floats)larger_word((Words)a, (Words)b); });
        if (any((Words)(largest >= INFINITE))) return false;
        const Words biased = (largest + OVER_464) >> 23;
        const Words exponent = choose((Ints)(biased > 8), biased - 8, all(1u)) & (Words)(largest != 0);
        const Bytes packed = bytes_of(exponent);
        memcpy(exponents + first, &packed, live);
        for (size_t v = 0; v < live; v++) {
            encode_vector<DTYPE>(from + (first + v) * vector_bytes, dim, exponent[v], codes + (first + v) * dim);
        }
    }
    return true;
}

// Only with the highest exponent can rounding have gone past what fp32 and bf16 hold; fp16 is limited where it is stored.
template <unsigned DTYPE>
LMPIPE_INLINE bool decode(const uint8_t *exponents, const uint8_t *codes, size_t n, size_t dim, uint8_t *to) {
    for (size_t v = 0; v < n; v++) {
        const uint32_t exponent = exponents[v];
        if (exponent > lmpipe::FP8_TOP_EXPONENT) return false;
        uint8_t *at = to + v * dim * ITEM_BYTES<DTYPE>;
        if (exponent < lmpipe::FP8_TOP_EXPONENT) decode_vector<DTYPE, false>(codes + v * dim, dim, exponent, at);
        else decode_vector<DTYPE, true>(codes + v * dim, dim, exponent, at);
    }
    return true;
}

// The usual length of a vector is known to the compiler.
constexpr size_t USUAL = 128;

template <unsigned DTYPE>
bool encode_any(const uint8_t *from, size_t n, size_t dim, uint8_t *exponents, uint8_t *codes) {
    return dim == USUAL ? encode<DTYPE>(from, n, USUAL, exponents, codes) : encode<DTYPE>(from, n, dim, exponents, codes);
}

template <unsigned DTYPE>
bool decode_any(const uint8_t *exponents, const uint8_t *codes, size_t n, size_t dim, uint8_t *to) {
    return dim == USUAL ? decode<DTYPE>(exponents, codes, n, USUAL, to) : decode<DTYPE>(exponents, codes, n, dim, to);
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

bool fp8_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, uint8_t *exponents, uint8_t *codes) {
    if (dtype == BF16) return encode_any<BF16>(from, n, dim, exponents, codes);
    if (dtype == FP16) return encode_any<FP16>(from, n, dim, exponents, codes);
    return encode_any<lmpipe::FP32>(from, n, dim, exponents, codes);
}

bool fp8_decode(const uint8_t *exponents, const uint8_t *codes, unsigned dtype, size_t n, size_t dim, uint8_t *to) {
    if (dtype == BF16) return decode_any<BF16>(exponents, codes, n, dim, to);
    if (dtype == FP16) return decode_any<FP16>(exponents, codes, n, dim, to);
    return decode_any<lmpipe::FP32>(exponents, codes, n, dim, to);
}

}  // namespace lmpipe::LMPIPE_LEVEL
