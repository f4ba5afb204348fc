// After the xxHash fast digest specification: four ways by length, of which only the last one is worth SIMD.
#include "xxh3.h"

#include <cstring>

#include "levels.h"
#include "xxh3_secret.h"

namespace lmpipe {
namespace {

constexpr uint64_t PRIME_MX1 = 0x165667919E3779F9u, PRIME_MX2 = 0x9FB21C651E98DF25u;

struct Hash128 {
    uint64_t low, high;
};

uint64_t read64(const uint8_t *p) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    return v;
}

uint32_t read32(const uint8_t *p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

uint64_t secret(size_t offset) { return read64(SECRET + offset); }

Hash128 multiply(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return {static_cast<uint64_t>(product), static_cast<uint64_t>(product >> 64)};
}

uint64_t fold(uint64_t a, uint64_t b) {
    const Hash128 product = multiply(a, b);
    return product.low ^ product.high;
}

uint64_t avalanche(uint64_t x) {
    x = (x ^ (x >> 37)) * PRIME_MX1;
    return x ^ (x >> 32);
}

uint64_t avalanche_xxh64(uint64_t x) {
    x = (x ^ (x >> 33)) * PRIME64_2;
    x = (x ^ (x >> 29)) * PRIME64_3;
    return x ^ (x >> 32);
}

Hash128 hash_1_to_3(const uint8_t *data, size_t bytes) {
    const uint32_t combined = data[bytes - 1] | static_cast<uint32_t>(bytes << 8) | static_cast<uint32_t>(data[0]) << 16 |
                              static_cast<uint32_t>(data[bytes >> 1]) << 24;
    const uint32_t swapped = __builtin_bswap32(combined);
    const uint32_t turned = swapped << 13 | swapped >> 19;
    const uint64_t low = static_cast<uint64_t>(read32(SECRET) ^ read32(SECRET + 4)) ^ combined;
    const uint64_t high = static_cast<uint64_t>(read32(SECRET + 8) ^ read32(SECRET + 12)) ^ turned;
    return {avalanche_xxh64(low), avalanche_xxh64(high)};
}

Hash128 hash_4_to_8(const uint8_t *data, size_t bytes) {
    const uint64_t combined = read32(data) | static_cast<uint64_t>(read32(data + bytes - 4)) << 32;
    auto [low, high] = multiply(secret(16) ^ secret(24) ^ combined, PRIME64_1 + (bytes << 2));
    high += low << 1;
    low ^= high >> 3;
    low = (low ^ (low >> 35)) * PRIME_MX2;
    low ^= low >> 28;
    return {low, avalanche(high)};
}

Hash128 hash_9_to_16(const uint8_t *data, size_t bytes) {
    const uint64_t first = read64(data), last = read64(data + bytes - 8);
    const uint64_t a = secret(32) ^ secret(40) ^ first ^ last, b = secret(48) ^ secret(56) ^ last;
    auto [low, high] = multiply(a, PRIME64_1);
    low += static_cast<uint64_t>(bytes - 1) << 54;
    high += b + static_cast<uint64_t>(static_cast<uint32_t>(b)) * (PRIME32_2 - 1);
    low ^= __builtin_bswap64(high);
    const Hash128 again = multiply(low, PRIME64_2);
    return {avalanche(again.low), avalanche(again.high + high * PRIME64_2)};
}

// The two accumulators of the lengths 17 to 240.
struct Mixer {
    uint64_t acc[2];

    static uint64_t step(const uint8_t *data, size_t secret_offset) {
        return fold(read64(data) ^ secret(secret_offset), read64(data + 8) ^ secret(secret_offset + 8));
    }
    void two(const uint8_t *a, const uint8_t *b, size_t secret_offset) {
        acc[0] += step(a, secret_offset);
        acc[1] += step(b, secret_offset + 16);
        acc[0] ^= read64(b) + read64(b + 8);
        acc[1] ^= read64(a) + read64(a + 8);
    }
    Hash128 finish(size_t bytes) const {
        const uint64_t high = acc[0] * PRIME64_1 + acc[1] * PRIME64_4 + bytes * PRIME64_2;
        return {avalanche(acc[0] + acc[1]), 0 - avalanche(high)};
    }
};

Hash128 hash_17_to_128(const uint8_t *data, size_t bytes) {
    Mixer mixer{{bytes * PRIME64_1, 0}};
    for (size_t i = (bytes - 1) / 32 + 1; i-- > 0;) mixer.two(data + 16 * i, data + bytes - 16 * i - 16, 32 * i);
    return mixer.finish(bytes);
}

Hash128 hash_129_to_240(const uint8_t *data, size_t bytes) {
    Mixer mixer{{bytes * PRIME64_1, 0}};
    for (size_t i = 0; i < 4; i++) mixer.two(data + 32 * i, data + 32 * i + 16, 32 * i);
    mixer.acc[0] = avalanche(mixer.acc[0]);
    mixer.acc[1] = avalanche(mixer.acc[1]);
    for (size_t i = 4; i < bytes / 32; i++) mixer.two(data + 32 * i, data + 32 * i + 16, 32 * (i - 4) + 3);
    mixer.two(data + bytes - 16, data + bytes - 32, 103);
    return mixer.finish(bytes);
}

uint64_t merge(const uint64_t acc[8], uint64_t result, size_t secret_offset) {
    for (size_t i = 0; i < 4; i++)
        result += fold(acc[2 * i] ^ secret(secret_offset + 16 * i), acc[2 * i + 1] ^ secret(secret_offset + 16 * i + 8));
    return avalanche(result);
}

Hash128 hash_long(const uint8_t *data, size_t bytes) {
    uint64_t acc[8];
    kernels().xxh3_accumulate(data, bytes, acc);
    return {merge(acc, bytes * PRIME64_1, 11), merge(acc, ~(bytes * PRIME64_2), SECRET_BYTES - 75)};
}

Hash128 hash(const uint8_t *data, size_t bytes) {
    if (bytes > 240) return hash_long(data, bytes);
    if (bytes > 128) return hash_129_to_240(data, bytes);
    if (bytes > 16) return hash_17_to_128(data, bytes);
    if (bytes > 8) return hash_9_to_16(data, bytes);
    if (bytes > 3) return hash_4_to_8(data, bytes);
    if (bytes > 0) return hash_1_to_3(data, bytes);
    return {avalanche_xxh64(secret(64) ^ secret(72)), avalanche_xxh64(secret(80) ^ secret(88))};
}

}  // namespace

void xxh3_128(const uint8_t *data, size_t bytes, uint8_t digest[16]) {
    const Hash128 h = hash(data, bytes);
    const uint64_t big_endian[2] = {__builtin_bswap64(h.high), __builtin_bswap64(h.low)};
    std::memcpy(digest, big_endian, 16);
}

}  // namespace lmpipe
