// Rotated vectors as codes of 1 to 8 bits between a minimum and a maximum: the codecs `int4h` and `adaptive`.
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
constexpr uint32_t ROUNDING_BITS = 0x4B000000;

struct Shape {
    size_t dim, block;
    float factor;  // 1 / root of the block
};

Shape shape_of(size_t dim) {
    size_t block = 1, power = 0;
    for (; block < WIDEST_BLOCK && dim % (2 * block) == 0; block *= 2) power++;
    return {dim, block, ROOTS[power]};
}

LMPIPE_INLINE FloatPair butterfly(FloatPair p) { return {p.a + p.b, p.a - p.b}; }

// ---- the rotation of one block ----------------------------------------------------------------------------------------

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate_block(const uint8_t *from, float *row) {
    constexpr size_t REGISTERS = BLOCK / LANES;
    Floats x[REGISTERS];
    for (size_t r = 0; r < REGISTERS; r += 2) {
        FloatPair p = butterfly(load_apart<DTYPE>(from + r * LANES * ITEM_BYTES<DTYPE>));
        for (size_t stride = 2; stride <= LANES; stride *= 2) p = butterfly(apart(p));
        x[r] = p.a;
        x[r + 1] = p.b;
    }
    for (size_t stride = 2; stride < REGISTERS; stride *= 2) {
        for (size_t r = 0; r < REGISTERS; r++) {
            if (r & stride) continue;
            const FloatPair p = butterfly({x[r], x[r + stride]});
            x[r] = p.a;
            x[r + stride] = p.b;
        }
    }
    for (size_t r = 0; r < REGISTERS; r++) store(row + r * LANES, x[r]);
}

template <unsigned DTYPE, size_t BLOCK>
LMPIPE_INLINE void rotate_block_back(const uint8_t *codes, Floats low, Floats step, uint8_t *to) {
    constexpr size_t REGISTERS = BLOCK / LANES;
    Floats x[REGISTERS];
    for (size_t r = 0; r < REGISTERS; r++) {
        const Words code = __builtin_convertvector(load<Bytes>(codes + r * LANES), Words);
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
    for (size_t r = 0; r < REGISTERS; r += 2) {
        FloatPair p = butterfly({x[r], x[r + 1]});
        for (size_t stride = LANES / 2; stride > 0; stride /= 2) p = butterfly(together(p));
        store_together<DTYPE>(to + r * LANES * ITEM_BYTES<DTYPE>, p);
    }
}

// Where a block is narrower than two registers.
void rotate_row(float *row, const Shape &shape, bool back) {
    for (size_t n = 1; n < shape.block; n *= 2) {
        const size_t stride = back ? shape.block / (2 * n) : n;
        for (size_t i = 0; i < shape.dim; i++) {
            if (i & stride) continue;
            const float a = row[i], b = row[i + stride];
            row[i] = a + b;
            row[i + stride] = a - b;
        }
    }
}

// ---- one vector -------------------------------------------------------------------------------------------------------

template <unsigned DTYPE>
LMPIPE_INLINE void rotate(const uint8_t *from, const Shape &shape, float *row) {
    const size_t block_bytes = shape.block * ITEM_BYTES<DTYPE>;
    const size_t blocks = shape.dim / shape.block;
    if (shape.block == 128) {
        for (size_t b = 0; b < blocks; b++) rotate_block<DTYPE, 128>(from + b * block_bytes, row + b * 128);
    } else if (shape.block == 64) {
        for (size_t b = 0; b < blocks; b++) rotate_block<DTYPE, 64>(from + b * block_bytes, row + b * 64);
    } else if (shape.block == 32) {
        for (size_t b = 0; b < blocks; b++) rotate_block<DTYPE, 32>(from + b * block_bytes, row + b * 32);
    } else {
        load_row<DTYPE>(from, shape.dim, row);
        rotate_row(row, shape, false);
        for (size_t i = shape.dim; i % PAIR; i++) row[i] = row[0];
    }
}

template <unsigned DTYPE>
LMPIPE_INLINE void rotate_back(const uint8_t *codes, float low, float step, const Shape &shape, uint8_t *to) {
    const size_t block_bytes = shape.block * ITEM_BYTES<DTYPE>;
    const size_t blocks = shape.dim / shape.block;
    const Floats lows = all(low), steps = all(step);
    if (shape.block == 128) {
        for (size_t b = 0; b < blocks; b++) rotate_block_back<DTYPE, 128>(codes + b * 128, lows, steps, to + b * block_bytes);
    } else if (shape.block == 64) {
        for (size_t b = 0; b < blocks; b++) rotate_block_back<DTYPE, 64>(codes + b * 64, lows, steps, to + b * block_bytes);
    } else if (shape.block == 32) {
        for (size_t b = 0; b < blocks; b++) rotate_block_back<DTYPE, 32>(codes + b * 32, lows, steps, to + b * block_bytes);
    } else {
        float row[MAX_HEAD_DIM];
        for (size_t i = 0; i < up_to(shape.dim, PAIR); i++) row[i] = low + step * (float)codes[i];
        rotate_row(row, shape, true);
        store_row<DTYPE>(to, shape.dim, row);
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
        store(codes + i, __builtin_convertvector(code, Bytes));
    }
    if (dim % PLANE_CODES) memset(codes + dim, 0, up_to(dim, PLANE_CODES) - dim);
    return stray;
}

// ---- all ----------------------------------------------------------------------------------------------------------------

template <unsigned DTYPE>
bool encode(const uint8_t *from, size_t n, const Shape &shape, const uint8_t *bits, uint8_t *scales, uint8_t *minima,
            uint8_t *planes) {
    const size_t dim = shape.dim, width = up_to(dim, PLANE_CODES), plane_bytes = (dim + 7) / 8;
    float rows[LANES * MAX_HEAD_DIM];
    uint8_t codes[LANES * MAX_HEAD_DIM];
    Words stray = {};
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        Floats least[LANES] = {}, most[LANES] = {}, levels = all(1.0f);
        for (size_t v = 0; v < live; v++) {
            float *row = rows + v * width;
            rotate<DTYPE>(from + (first + v) * dim * ITEM_BYTES<DTYPE>, shape, row);
            least[v] = most[v] = load<Floats>(row);
            for (size_t i = LANES; i < dim; i += LANES) {
                least[v] = smaller(least[v], load<Floats>(row + i));
                most[v] = larger(most[v], load<Floats>(row + i));
            }
            levels[v] = (float)((1u << bits[first + v]) - 1);
        }
        // Adding zero makes a zero of minus zero.
        const Floats lowest = joined(least, smaller) * shape.factor + 0.0f;
        const Floats highest = joined(most, larger) * shape.factor + 0.0f;
        const Shorts minimum = halves_below(lowest);
        const Floats base = from_halves(minimum);
        const Shorts scale = halves_above((highest - base) / levels);
        const Floats step = from_halves(scale);
        const Floats inverse = (Floats)((Words)(1.0f / step) & (Words)(step != 0.0f));
        uint16_t exponents = 0;
        for (size_t v = 0; v < live; v++) {
            const uint16_t s = scale[v], m = minimum[v];
            exponents |= (uint16_t)((s & HALF_INFINITY) == HALF_INFINITY) | (uint16_t)((m & HALF_INFINITY) == HALF_INFINITY);
            store(scales + 2 * (first + v), s);
            store(minima + 2 * (first + v), m);
            stray |= quantise(rows + v * width, dim, base[v], shape.factor, inverse[v], codes + v * width);
        }
        const Words high = stray & ~0xFFu;
        for (size_t i = 0; i < LANES; i++) exponents |= high[i] != 0;
        if (exponents) return false;
        for (size_t v = 0; v < live; v++) {
            PUT_PLANES[bits[first + v]](codes + v * width, dim, planes);
            planes += bits[first + v] * plane_bytes;
        }
    }
    return true;
}

template <unsigned DTYPE>
bool decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, size_t n, const Shape &shape,
            const uint8_t *bits, uint8_t *to) {
    const size_t dim = shape.dim, plane_bytes = (dim + 7) / 8;
    uint8_t codes[MAX_HEAD_DIM];
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        Shorts scale = {}, minimum = {};
        memcpy(&scale, scales + 2 * first, 2 * live);
        memcpy(&minimum, minima + 2 * first, 2 * live);
        const Shorts exponents = (Shorts)((scale & HALF_INFINITY) == HALF_INFINITY) |
                                 (Shorts)((minimum & HALF_INFINITY) == HALF_INFINITY);
        for (size_t v = 0; v < live; v++) if (exponents[v]) return false;
        const Floats step = from_halves(scale) * shape.factor, low = from_halves(minimum) * shape.factor;
        for (size_t v = 0; v < live; v++) {
            TAKE_PLANES[bits[first + v]](planes, dim, codes);
            planes += bits[first + v] * plane_bytes;
            rotate_back<DTYPE>(codes, low[v], step[v], shape, to + (first + v) * dim * ITEM_BYTES<DTYPE>);
        }
    }
    return true;
}

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

bool rotated_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, const uint8_t *bits, uint8_t *scales,
                    uint8_t *minima, uint8_t *planes) {
    const Shape shape = shape_of(dim);
    if (dtype == BF16) return encode<BF16>(from, n, shape, bits, scales, minima, planes);
    if (dtype == FP16) return encode<FP16>(from, n, shape, bits, scales, minima, planes);
    return encode<lmpipe::FP32>(from, n, shape, bits, scales, minima, planes);
}

bool rotated_decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, unsigned dtype, size_t n,
                    size_t dim, const uint8_t *bits, uint8_t *to) {
    const Shape shape = shape_of(dim);
    if (dtype == BF16) return decode<BF16>(scales, minima, planes, n, shape, bits, to);
    if (dtype == FP16) return decode<FP16>(scales, minima, planes, n, shape, bits, to);
    return decode<lmpipe::FP32>(scales, minima, planes, n, shape, bits, to);
}

}  // namespace lmpipe::LMPIPE_LEVEL
