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

// ---- the rotation of one block --------------------------------------------------------------------------------------

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

// ---- up to LANES vectors --------------------------------------------------------------------------------------------
//
// BLOCK is 128, 64, 32, or 0 for any other `block`. Only these two know dtype and block: what is around them is compiled
// once.

// Rows lie `width` numbers apart. least, most: of each vector, by lanes; not yet times the factor.
template <unsigned DTYPE, size_t BLOCK>
void rotate(const uint8_t *from, size_t live, size_t dim, size_t block, size_t width, float *rows, Floats *least,
            Floats *most) {
    for (size_t v = 0; v < live; v++, from += dim * ITEM_BYTES<DTYPE>, rows += width) {
        Floats low = all(LARGEST), high = all(-LARGEST);
        if constexpr (BLOCK) {
            for (size_t i = 0; i < dim; i += BLOCK) {
                rotate_block<DTYPE, BLOCK>(from + i * ITEM_BYTES<DTYPE>, rows + i, low, high);
            }
        } else {
            load_row<DTYPE>(from, dim, rows);
            rotate_row(rows, dim, block, false);
            for (size_t i = dim; i % PAIR; i++) rows[i] = rows[0];
            for (size_t i = 0; i < dim; i += LANES) {
                low = smaller(low, load<Floats>(rows + i));
                high = larger(high, load<Floats>(rows + i));
            }
        }
        least[v] = low;
        most[v] = high;
    }
}

template <unsigned DTYPE, size_t BLOCK>
void rotate_back(const uint8_t *codes, size_t live, size_t dim, size_t block, size_t width, Floats lows, Floats steps,
                 uint8_t *to) {
    for (size_t v = 0; v < live; v++, codes += width, to += dim * ITEM_BYTES<DTYPE>) {
        const float low = lows[v], step = steps[v];
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
}

struct Rotation {
    size_t item_bytes;
    void (*forth)(const uint8_t *, size_t, size_t, size_t, size_t, float *, Floats *, Floats *);
    void (*back)(const uint8_t *, size_t, size_t, size_t, size_t, Floats, Floats, uint8_t *);
};

template <unsigned DTYPE>
Rotation rotation_of(size_t block) {
    if (block == 128) return {ITEM_BYTES<DTYPE>, rotate<DTYPE, 128>, rotate_back<DTYPE, 128>};
    if (block == 64) return {ITEM_BYTES<DTYPE>, rotate<DTYPE, 64>, rotate_back<DTYPE, 64>};
    if (block == 32) return {ITEM_BYTES<DTYPE>, rotate<DTYPE, 32>, rotate_back<DTYPE, 32>};
    return {ITEM_BYTES<DTYPE>, rotate<DTYPE, 0>, rotate_back<DTYPE, 0>};
}

Rotation rotation_of(unsigned dtype, size_t block) {
    if (dtype == BF16) return rotation_of<BF16>(block);
    if (dtype == FP16) return rotation_of<FP16>(block);
    return rotation_of<lmpipe::FP32>(block);
}

// ---- codes ----------------------------------------------------------------------------------------------------------

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

// ---- all ------------------------------------------------------------------------------------------------------------

LMPIPE_INLINE bool encode(const Rotation &rotation, const uint8_t *from, size_t n, size_t dim, size_t block,
                          const uint8_t *bits, uint8_t *scales, uint8_t *minima, uint8_t *planes) {
    const size_t width = up_to(dim, PLANE_CODES);
    const float factor = root_of(block);
    float rows[LANES * MAX_HEAD_DIM];
    uint8_t codes[LANES * MAX_HEAD_DIM];
    // Beyond the last vector there are those of LANES vectors before.
    Floats least[LANES] = {}, most[LANES] = {}, levels = all(1.0f);
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        rotation.forth(from + first * dim * rotation.item_bytes, live, dim, block, width, rows, least, most);
        for (size_t v = 0; v < live; v++) levels[v] = (float)((1u << bits[first + v]) - 1);
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

LMPIPE_INLINE bool decode(const Rotation &rotation, const uint8_t *scales, const uint8_t *minima, const uint8_t *planes,
                          size_t n, size_t dim, size_t block, const uint8_t *bits, uint8_t *to) {
    const size_t width = up_to(dim, PLANE_CODES);
    const float factor = root_of(block);
    uint8_t codes[LANES * MAX_HEAD_DIM];
    for (size_t first = 0; first < n; first += LANES) {
        const size_t live = n - first < LANES ? n - first : LANES;
        Shorts scale = {}, minimum = {};
        memcpy(&scale, scales + 2 * first, 2 * live);
        memcpy(&minimum, minima + 2 * first, 2 * live);
        if (any(infinite(scale) | infinite(minimum))) return false;
        const Floats step = from_halves(scale) * factor, low = from_halves(minimum) * factor;
        for (size_t v = 0; v < live; v++) planes = take_codes(planes, dim, bits[first + v], codes + v * width);
        rotation.back(codes, live, dim, block, width, low, step, to + first * dim * rotation.item_bytes);
    }
    return true;
}

size_t block_of(size_t dim) {
    size_t block = 1;
    while (block < WIDEST_BLOCK && dim % (2 * block) == 0) block *= 2;
    return block;
}

// The usual length of a vector is known to the compiler.
constexpr size_t USUAL = 128;

}  // namespace

namespace lmpipe::LMPIPE_LEVEL {

bool rotated_encode(const uint8_t *from, unsigned dtype, size_t n, size_t dim, const uint8_t *bits, uint8_t *scales,
                    uint8_t *minima, uint8_t *planes) {
    const size_t block = block_of(dim);
    const Rotation rotation = rotation_of(dtype, block);
    return dim == USUAL ? encode(rotation, from, n, USUAL, USUAL, bits, scales, minima, planes)
                        : encode(rotation, from, n, dim, block, bits, scales, minima, planes);
}

bool rotated_decode(const uint8_t *scales, const uint8_t *minima, const uint8_t *planes, unsigned dtype, size_t n,
                    size_t dim, const uint8_t *bits, uint8_t *to) {
    const size_t block = block_of(dim);
    const Rotation rotation = rotation_of(dtype, block);
    return dim == USUAL ? decode(rotation, scales, minima, planes, n, USUAL, USUAL, bits, to)
                        : decode(rotation, scales, minima, planes, n, dim, block, bits, to);
}

}  // namespace lmpipe::LMPIPE_LEVEL
