// The hash functions as Python sees them.
#include <cstring>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "levels.h"
#include "region.h"
#include "xxh3.h"

namespace lmpipe {
namespace {

constexpr size_t BLAKE3_BYTES = 32, KEY_BYTES = 16, XXH3_BYTES = 16;

NewDigests blake3_many(nb::object data, uint64_t item_bytes) {
    const Region region = Region::of_buffer(data, "data");
    if (item_bytes == 0 ? region.nbytes() != 0 : region.nbytes() % item_bytes != 0) {
        throw std::invalid_argument("data: " + std::to_string(region.nbytes()) + " bytes are not a whole number of items of " +
                                    std::to_string(item_bytes) + " bytes");
    }
    const size_t n = item_bytes ? region.nbytes() / item_bytes : 0;
    nb::capsule owner;
    auto *out = new_data<uint8_t>(n * BLAKE3_BYTES, owner);
    run_freed(region.nbytes(), [&] { kernels().blake3_many(region.base(), n, item_bytes, out); });
    return digests_of(out, n, BLAKE3_BYTES, owner);
}

const uint8_t *exact_bytes(const nb::bytes &value, size_t bytes, const char *argument) {
    if (value.size() != bytes) {
        throw std::invalid_argument(std::string(argument) + ": " + std::to_string(bytes) + " bytes are needed, these are " +
                                    std::to_string(value.size()));
    }
    return reinterpret_cast<const uint8_t *>(value.c_str());
}

NewDigests chain_keys(const nb::bytes &name_space, const nb::bytes &parent, Matrix<uint8_t> content) {
    const uint8_t *key = exact_bytes(name_space, 32, "namespace");
    const uint8_t *first = exact_bytes(parent, KEY_BYTES, "parent");
    if (content.shape(1) != BLAKE3_BYTES) {
        throw std::invalid_argument("content: rows of 32 bytes are needed, these have " + std::to_string(content.shape(1)));
    }
    const size_t n = content.shape(0);
    nb::capsule owner;
    auto *out = new_data<uint8_t>(n * KEY_BYTES, owner);
    run_freed(n * BLAKE3_BYTES, [&] { kernels().blake3_chain(key, first, content.data(), n, out); });
    return digests_of(out, n, KEY_BYTES, owner);
}

nb::bytes xxh3_whole(nb::object data) {
    const Region region = Region::of_buffer(data, "data");
    uint8_t digest[XXH3_BYTES];
    run_freed(region.nbytes(), [&] { xxh3_128(region.base(), region.nbytes(), digest); });
    return nb::bytes(digest, sizeof digest);
}

NewDigests xxh3_pieces(nb::object data, Vector<uint64_t> piece_bytes) {
    const Region region = Region::of_buffer(data, "data");
    const size_t n = piece_bytes.shape(0);
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        const uint64_t bytes = piece_bytes.data()[i];
        if (bytes > region.nbytes() - total) {
            throw std::invalid_argument("piece_bytes[" + std::to_string(i) + "]: " + std::to_string(bytes) +
                                        " bytes at offset " + std::to_string(total) + " run past the data, which has " +
                                        std::to_string(region.nbytes()) + " bytes");
        }
        total += bytes;
    }
    nb::capsule owner;
    auto *out = new_data<uint8_t>(n * XXH3_BYTES, owner);
    run_freed(total, [&] {
        const uint8_t *piece = region.base(), *const end = piece + total;
        for (size_t i = 0; i < n; i++) {
            // Read again: another thread may have changed the array since it was checked.
            const uint64_t left = static_cast<uint64_t>(end - piece), asked = piece_bytes.data()[i];
            const uint64_t bytes = asked < left ? asked : left;
            xxh3_128(piece, bytes, out + i * XXH3_BYTES);
            piece += bytes;
        }
    });
    return digests_of(out, n, XXH3_BYTES, owner);
}

}  // namespace

void bind_hash(nb::module_ &m) {
    m.def("blake3_many", &blake3_many, nb::arg("data"), nb::arg("item_bytes"));
    m.def("chain_keys", &chain_keys, nb::arg("namespace"), nb::arg("parent"), nb::arg("content").noconvert());
    m.def("xxh3_128", &xxh3_whole, nb::arg("data"));
    m.def("xxh3_128_pieces", &xxh3_pieces, nb::arg("data"), nb::arg("piece_bytes").noconvert());
}

}  // namespace lmpipe
