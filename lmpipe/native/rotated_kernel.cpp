// Rotated vectors as codes of 3, 4 or 8 bits between a minimum and a maximum: the codecs `int4h` and `adaptive`.
//
//     rotated number = minimum + scale * code
//
// The rotation is a Hadamard matrix over blocks of a power of two, divided by its root: butterflies of 1, 2, 4, ...
// neighbours when encoding, in the opposite order when decoding. With even and odd lanes taken apart before each, all
// butterflies are sums and differences of two registers, whatever a register holds. Multiplications and additions are
// rounded one by one (-ffp-contract=off): every level computes the same bits.
//
// LANES vectors at a time, so that their scales are found side by side.
#include "kernels.h"
#include "numbers.h"
#include "planes.h"

namespace {

using lmpipe::MAX_HEAD_DIM;

constexpr size_t WIDEST_BLOCK = 128;
constexpr float ROOTS[] = {1.0f, 0x1.6a09e6p-1f, 0.5f, 0x1.6a09e6p-2f, 0.25f, 0x1.6a09e6p-3f, 0.125f, 0x1.6a09e6p-4f};

// A sum of a number of up to 2^22 and this has the rounded number in its last bits.
constexpr float ROUNDING = 8388608.0f;
constexpr float LARGEST = 0x1.fffffep127f;
constexpr uint32_t ROUNDING_BITS = 0x4B000000;

float root_of(size_t block) {
    size_t power = 0;
    while (block >> (power + 1)) power++;
    return ROOTS[power];
}

LMPIPE_INLINE FloatPair butterfly(FloatPair p) { return {p.a + p.b, p.a - p.b}; }

LMPIPE_INLINE void put(Floats *two, FloatPair p) {
    two[0] = p.a;
    two[1] = p.b;
}

// ---- the rotation of one block ----------------------------------------------------------------------------------------

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate_block(const uint8_t *from, float *row, Floats &least, Floats &most) {
    constexpr size_t REGISTERS = BLOCK / LANES;
    Floats x[REGISTERS];
    for (size_t r = 0; r < REGISTERS; r += 2) {
        put(x + r, butterfly(load_apart<DTYPE>(from + r * LANES * ITEM_BYTES<DTYPE>)));
    }
    for (size_t stride = 2; stride <= LANES; stride *= 2) {
        for (size_t r = 0; r < REGISTERS; r += 2) put(x + r, butterfly(apart({x[r], x[r + 1]})));
    }
    for (size_t stride = 2; stride < REGISTERS; stride *= 2) {
        for (size_t r = 0; r < REGISTERS; r++) {
            if (r & stride) continue;
            const FloatPair p = butterfly({x[r], x[r + stride]});
            x[r] = p.a;
            x[r + stride] = p.b;
        }
    }
    for (size_t r = 0; r < REGISTERS; r++) {
        least = smaller(least, x[r]);
        most = larger(most, x[r]);
        store(row + r * LANES, x[r]);
    }
}

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate_block_back(const uint8_t *codes, Floats low, Floats step, uint8_t *to) {
    constexpr size_t REGISTERS = BLOCK / LANES;
    Floats x[REGISTERS];
    for (size_t r = 0; r < REGISTERS; r++) {
        const Words code = widened(load<Bytes>(codes + r * LANES));
        x[r] = low + step * __builtin_convertvector((Ints)code, Floats);
    }
    for (size_t stride = REGISTERS / 2; stride > 1; stride /= 2) {
        for (size_t r = 0; r < REGISTERS; r++) {
            if (r & stride) continue;
            const FloatPair p = butterfly({x[r], x[r + stride]});
            x[r] = p.a;
            x[r + stride] = p.b;
        }
    }
    for (size_t r = 0; r < REGISTERS; r += 2) put(x + r, butterfly({x[r], x[r + 1]}));
    for (size_t stride = LANES / 2; stride > 0; stride /= 2) {
        for (size_t r = 0; r < REGISTERS; r += 2) put(x + r, butterfly(together({x[r], x[r + 1]})));
    }
    for (size_t r = 0; r < REGISTERS; r += 2) {
        store_together<DTYPE>(to + r * LANES * ITEM_BYTES<DTYPE>, {x[r], x[r + 1]});
    }
}

// Where a block is narrower than two registers of any level.
void rotate_row(float *row, size_t dim, size_t block, bool back) {
    for (size_t n = 1; n < block; n *= 2) {
        const size_t stride = back ? block / (2 * n) : n;
        for (size_t i = 0; i < dim; i++) {
            if (i & stride) continue;
            const float a = row[i], b = row[i + stride];
            row[i] = a + b;
            row[i + stride] = a - b;
        }
    }
}

// ---- one vector: BLOCK is 128, 64, 32, or 0 for `block` -------------------------------------------------------------------

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate(const uint8_t *from, size_t dim, size_t block, float *row, Floats &least, Floats &most) {
    if constexpr (BLOCK) {
        for (size_t i = 0; i < dim; i += BLOCK) {
            rotate_block<DTYPE, BLOCK>(from + i * ITEM_BYTES<DTYPE>, row + i, least, most);
        }
    } else {
        load_row<DTYPE>(from, dim, row);
        rotate_row(row, dim, block, false);
        for (size_t i = dim; i % PAIR; i++) row[i] = row[0];
        for (size_t i = 0; i < dim; i += LANES) {
            least = smaller(least, load<Floats>(row + i));
            most = larger(most, load<Floats>(row + i));
        }
    }
}

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate_back(const uint8_t *codes, float low, float step, size_t dim, size_t block, uint8_t *to) {
    if constexpr (BLOCK) {
        for (size_t i = 0; i < dim; i += BLOCK) {
            rotate_block_back<DTYPE, BLOCK>(codes + i, all(low), all(step), to + i * ITEM_BYTES<DTYPE>);
        }
    } else {
        float row[MAX_HEAD_DIM];
        for (size_t i = 0; i < up_to(dim, PAIR); i++) row[i] = low + step * (float)codes[i];
        rotate_row(row, dim, block, true);
        store_row<DTYPE>(to, dim, row);
    }
}

// Codes as bytes, zeros up to a multiple of PLANE_CODES. What comes back has bits above the lowest byte in a lane that
// met a number that is not finite.
LMPIPE_INLINE Words quantise(const float *row, size_t dim, float minimum, float factor, float inverse, uint8_t *codes) {
    const Floats base = all(minimum), root = all(factor), gain = all(inverse);
    Words stray = {};
    for (size_t i = 0; i < dim; i += LANES) {
        const Words code = (Words)((load<Floats>(row + i) * root - base) * gain + ROUNDING) ^ ROUNDING_BITS;
        stray |= code;
        store(codes + i, bytes_of(code));
    }
    if (dim % PLANE_CODES) memset(codes + dim, 0, up_to(dim, PLANE_CODES) - dim);
    return stray;
}

LMPIPE_INLINE const uint8_t *take_codes(const uint8_t *planes, size_t dim, unsigned bits, uint8_t *codes) {
    if (bits == 4) take_planes<4>(planes, dim, codes);
    else if (bits == 3) take_planes<3>(planes, dim, codes);
    else take_planes<8>(planes, dim, codes);
    return planes + bits * ((dim + 7) / 8);
}

LMPIPE_INLINE uint8_t *put_codes(const uint8_t *codes, size_t dim, unsigned bits, uint8_t *planes) {
    if (bits == 4) put_planes<4>(codes, dim, planes);
    else if (bits == 3) put_planes<3>(codes, dim, planes);
    else put_planes<8>(codes, dim, planes);
    return planes + bits * ((dim + 7) / 8);
}

LMPIPE_INLINE Words infinite(Shorts halves) {
    return (Words)((widened(halves) & HALF_INFINITY) == HALF_INFINITY);
}

// ---- all ----------------------------------------------------------------------------------------------------------------

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE bool encode(const uint8_t *from, size_t n, size_t dim, size_t block, const uint8_t *bits, uint8_t *scales,
            uint8_t *minima, uint8_t *planes) {
    const size_t width = up_to(dim, PLANE_CODES);
    const float factor = root_of(block);
    float rows[LANES * MAX_HEAD_DIM];
    uint8_t codes[LANES * MAX_HEAD_DIM];
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        Floats least[LANES] = {}, most[LANES] = {}, levels = all(1.0f);
        for (size_t v = 0; v < live; v++) {
            float *row = rows + v * width;
            least[v] = all(LARGEST);
            most[v] = all(-LARGEST);
            rotate<DTYPE, BLOCK>(from + (first + v) * dim * ITEM_BYTES<DTYPE>, dim, block, row, least[v], most[v]);
            levels[v] = (float)((1u << bits[first + v]) - 1);
        }
        // Adding zero makes a zero of minus zero.
        const Floats lowest = joined(least, smaller) * factor + 0.0f, highest = joined(most, larger) * factor + 0.0f;
        const Shorts minimum = halves_below(lowest);
        const Floats base = from_halves(minimum);
        const Shorts scale = halves_above((highest - base) / levels);
        const Floats step = from_halves(scale);
        const Floats inverse = (Floats)((Words)(1.0f / step) & (Words)(step != 0.0f));
        memcpy(scales + 2 * first, &scale, 2 * live);
        memcpy(minima + 2 * first, &minimum, 2 * live);
        Words stray = {};
        for (size_t v = 0; v < live; v++) {
            stray |= quantise(rows + v * width, dim, base[v], factor, inverse[v], codes + v * width);
        }
        if (any((stray & ~0xFFu) | infinite(scale) | infinite(minimum))) return false;
        for (size_t v = 0; v < live; v++) planes = put_codes(codes + v * width, dim, bits[first + v], planes);
    }
    return true;
}

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE bool decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, size_t n, size_t dim, size_t block,
            const uint8_t *bits, uint8_t *to) {
    const float factor = root_of(block);
    uint8_t codes[MAX_HEAD_DIM];
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        Shorts scale = {}, minimum = {};
        memcpy(&scale, scales + 2 * first, 2 * live);
        memcpy(&minimum, minima + 2 * first, 2 * live);
        if (any(infinite(scale) | infinite(minimum))) return false;
        const Floats step = from_halves(scale) * factor, low = from_halves(minimum) * factor;
        for (size_t v = 0; v < live; v++) {
            planes = take_codes(planes, dim, bits[first + v], codes);
            uint8_t *at = to + (first + v) * dim * ITEM_BYTES<DTYPE>;
            rotate_back<DTYPE, BLOCK>(codes, low[v], step[v], dim, block, at);
        }
    }
    return true;
}

// Vectors of one block, which are the usual ones, have a length that the compiler knows.
template <unsigned DTYPE, size_t BLOCK>
bool encode_any(const uint8_t *from, size_t n, size_t dim, size_t block, const uint8_t *bits, uint8_t *scales,
                uint8_t *minima, uint8_t *planes) {
    return dim == BLOCK ? encode<DTYPE, BLOCK>(from, n, BLOCK, BLOCK, bits, scales, minima, planes)
                        : encode<DTYPE, BLOCK>(from, n, dim, block, bits, scales, minima, planes);
}

template <unsigned DTYPE, size_t BLOCK>
bool decode_any(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, size_t n, size_t dim, size_t block,
                const uint8_t *bits, uint8_t *to) {
    return dim == BLOCK ? decode<DTYPE, BLOCK>(scales, minima, planes, n, BLOCK, BLOCK, bits, to)
                        : decode<DTYPE, BLOCK>(scales, minima, planes, n, dim, block, bits, to);
}

size_t block_of(size_t dim) {
    size_t block = 1;
    while (block < WIDEST_BLOCK && dim % (2 * block) == 0) block *= 2;
    return block;
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

#define LMPIPE_BY_BLOCK(call, dtype, ...)                                  \
    (block == 128  ? call<dtype, 128>(__VA_ARGS__)                         \
     : block == 64 ? call<dtype, 64>(__VA_ARGS__)                          \
     : block == 32 ? call<dtype, 32>(__VA_ARGS__)                          \
                   : call<dtype, 0>(__VA_ARGS__))

#define LMPIPE_BY_TYPE_AND_BLOCK(call, ...)                                \
    (dtype == BF16   ? LMPIPE_BY_BLOCK(call, BF16, __VA_ARGS__)            \
     : dtype == FP16 ? LMPIPE_BY_BLOCK(call, FP16, __VA_ARGS__)            \
                     : LMPIPE_BY_BLOCK(call, FP32, __VA_ARGS__))

bool rotated_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, const uint8_t *bits, uint8_t *scales,
                    uint8_t *minima, uint8_t *planes) {
    const size_t block = block_of(dim);
    return LMPIPE_BY_TYPE_AND_BLOCK(encode_any, from, n, dim, block, bits, scales, minima, planes);
}

bool rotated_decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, unsigned dtype, size_t n,
                    size_t dim, const uint8_t *bits, uint8_t *to) {
    const size_t block = block_of(dim);
    return LMPIPE_BY_TYPE_AND_BLOCK(decode_any, scales, minima, planes, n, dim, block, bits, to);
}

}  // namespace lmpipe::LMPIPE_LEVEL
