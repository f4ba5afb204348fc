// XXH3 with 128 bits of output, seed 0 and the default secret.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmpipe {

// Writes the canonical (big-endian) digest, as xxhash prints it.
void xxh3_128(const uint8_t *data, size_t bytes, uint8_t digest[16]);

}  // namespace lmpipe
