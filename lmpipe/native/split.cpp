// The `split` codec as Python sees it: table, blocks and tail around the kernel, which knows one block.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "levels.h"
#include "region.h"

namespace lmpipe {
namespace {

constexpr size_t ROW_BYTES = sizeof(SplitRow), LINE_BYTES = 64;
static_assert(ROW_BYTES == 8);

// The pieces of a block of `n` numbers: rest, planes, escapes. `rest` is bytes per number and then planes.
struct Form {
    SplitForm form;
    size_t item_bytes, rest_bytes, rest_planes;

    size_t plain_bytes(size_t n, size_t bits) const { return n * rest_bytes + (rest_planes + bits) * ((n + 7) / 8); }
};

Form form_of(unsigned dtype) {
    if (dtype == 1) return {SplitForm::bf16, 2, 1, 0};
    if (dtype == 2) return {SplitForm::fp16, 2, 1, 3};
    if (dtype == 3) return {SplitForm::fp32, 4, 3, 0};
    throw std::invalid_argument("dtype: 1 to 3 are possible, this is " + std::to_string(dtype));
}

// Room for a block in whole groups, and for what the kernel may touch behind it.
struct Room {
    alignas(64) uint8_t block[SPLIT_NUMBERS * 6 + SPLIT_GROUP];
    alignas(64) uint8_t numbers[SPLIT_NUMBERS * 4];
    alignas(64) uint8_t escapes[SPLIT_NUMBERS + SPLIT_GROUP];
};

// A block of n numbers has planes of whole bytes, the kernel's of whole groups. Calls `piece(wide, narrow, bytes, is_plane)`
// with where each piece is in the one and in the other.
template <typename Piece>
void each_piece(const Form &form, size_t n, size_t groups, size_t bits, Piece &&piece) {
    const size_t wide_n = groups * SPLIT_GROUP, plane_bytes = (n + 7) / 8;
    size_t wide = 0, narrow = 0;
    const auto one = [&](size_t wide_bytes, size_t bytes, bool is_plane) {
        piece(wide, narrow, bytes, is_plane);
        wide += wide_bytes, narrow += bytes;
    };
    if (form.rest_bytes == 3) one(2 * wide_n, 2 * n, false);
    one(wide_n, n, false);
    for (size_t b = 0; b < form.rest_planes + bits; b++) one(wide_n / 8, plane_bytes, true);
}

void copy(const uint8_t *from, uint8_t *to, size_t bytes) {
    const Run run{from, to, bytes};
    kernels().copy_runs(&run, 1);
}

size_t blocks_of(const Form &form, uint64_t nbytes) {
    const uint64_t n = nbytes / form.item_bytes;
    return (n + SPLIT_NUMBERS - 1) / SPLIT_NUMBERS;
}

// Encodes the n numbers of one block into `room.block`; returns its row, and where its bytes are.
SplitRow encode_block(const Form &form, const uint8_t *numbers, size_t n, Room &room, const uint8_t *&block, size_t &bytes) {
    const size_t groups = (n + SPLIT_GROUP - 1) / SPLIT_GROUP, pads = groups * SPLIT_GROUP - n;
    const uint8_t *whole = numbers;
    if (pads) {
        std::memcpy(room.numbers, numbers, n * form.item_bytes);
        std::memset(room.numbers + n * form.item_bytes, 0, pads * form.item_bytes);
        whole = room.numbers;
    }
    const SplitRow row = kernels().split_encode(form.form, whole, groups, pads, room.block);
    if (row.bits == SPLIT_RAW) {
        block = numbers, bytes = n * form.item_bytes;
        return row;
    }
    block = room.block, bytes = form.plain_bytes(n, row.bits) + row.escapes;
    if (pads) {
        each_piece(form, n, groups, row.bits, [&](size_t wide, size_t narrow, size_t piece_bytes, bool is_plane) {
            std::memmove(room.block + narrow, room.block + wide, piece_bytes);
            if (is_plane && n % 8) room.block[narrow + piece_bytes - 1] &= static_cast<uint8_t>((1 << n % 8) - 1);
        });
        std::memmove(room.block + bytes - row.escapes, room.block + form.plain_bytes(groups * SPLIT_GROUP, row.bits), row.escapes);
    }
    return row;
}

uint64_t encode(const Form &form, const uint8_t *src, uint64_t nbytes, uint8_t *dst, uint64_t room_bytes) {
    const size_t blocks = blocks_of(form, nbytes);
    const auto take = [&](uint64_t used, uint64_t bytes) {
        if (bytes > room_bytes || used > room_bytes - bytes) {
            throw std::invalid_argument("dst: more than " + std::to_string(used) + " bytes do not fit a buffer of " +
                                        std::to_string(room_bytes));
        }
        return dst + used;
    };
    const uint64_t body = blocks * ROW_BYTES;
    uint8_t *const table = take(0, body);
    uint64_t used = body;
    Room room;
    for (size_t b = 0; b < blocks; b++) {
        const uint64_t at = b * SPLIT_NUMBERS * form.item_bytes;
        const size_t n = std::min<uint64_t>(SPLIT_NUMBERS, (nbytes - at) / form.item_bytes);
        const uint8_t *block;
        size_t bytes;
        SplitRow row = encode_block(form, src + at, n, room, block, bytes);
        row.offset = static_cast<uint32_t>(used - body);
        std::memcpy(table + b * ROW_BYTES, &row, ROW_BYTES);
        copy(block, take(used, bytes), bytes);
        used += bytes;
    }
    const uint64_t tail = nbytes % form.item_bytes;
    std::memcpy(take(used, tail), src + nbytes - tail, tail);
    kernels().store_fence();
    return used + tail;
}

// What is wrong with a row, or nothing. `left`: bytes from its block's beginning to the end of the body.
std::string wrong_row(const Form &form, const SplitRow &row, size_t n, uint64_t offset, uint64_t left, size_t &bytes) {
    const auto is = [](uint64_t found, const char *what, uint64_t expected) {
        return what + std::string(" is ") + std::to_string(found) + " where " + std::to_string(expected);
    };
    if (row.offset != offset) return is(row.offset, "offset", offset) + " was expected";
    if (row.bits != SPLIT_RAW && (row.bits < 2 || row.bits > 4)) return is(row.bits, "bits", 4) + " are the most";
    if (row.escapes > (row.bits == SPLIT_RAW ? 0 : n)) return is(row.escapes, "number of escapes", n) + " numbers are";
    bytes = row.bits == SPLIT_RAW ? n * form.item_bytes : form.plain_bytes(n, row.bits) + row.escapes;
    if (bytes > left) return is(bytes, "length", left) + " bytes are left";
    return "";
}

bool decode_block(const Form &form, const SplitRow &row, const uint8_t *block, size_t bytes, uint8_t *numbers, size_t n, Room &room) {
    if (row.bits == SPLIT_RAW) {
        copy(block, numbers, bytes);
        return true;
    }
    const size_t groups = (n + SPLIT_GROUP - 1) / SPLIT_GROUP;
    const bool whole = n % SPLIT_GROUP == 0, aligned = reinterpret_cast<uintptr_t>(numbers) % LINE_BYTES == 0;
    std::memcpy(room.escapes, block + bytes - row.escapes, row.escapes);
    if (!whole) {
        std::memset(room.block, 0, sizeof room.block);
        each_piece(form, n, groups, row.bits, [&](size_t wide, size_t narrow, size_t piece_bytes, bool is_plane) {
            std::memcpy(room.block + wide, block + narrow, piece_bytes);
            if (is_plane && n % 8) room.block[wide + piece_bytes - 1] &= static_cast<uint8_t>((1 << n % 8) - 1);
        });
        block = room.block;
    }
    const bool direct = whole && aligned;
    uint8_t *const to = direct ? numbers : room.numbers;
    if (!kernels().split_decode(form.form, block, room.escapes, groups, row, to, direct)) return false;
    if (!direct) copy(room.numbers, numbers, n * form.item_bytes);
    return true;
}

// Rows are read once, and checked before anything is read or written by them: another process may be writing to src.
std::string decode(const Form &form, const uint8_t *src, uint64_t src_bytes, uint8_t *dst, uint64_t nbytes) {
    const size_t blocks = blocks_of(form, nbytes);
    const uint64_t body = blocks * ROW_BYTES, tail = nbytes % form.item_bytes;
    if (src_bytes < body + tail) {
        return "a table of " + std::to_string(body) + " bytes was expected, there are " + std::to_string(src_bytes) + " in all";
    }
    const uint64_t body_bytes = src_bytes - body - tail;
    uint64_t offset = 0;
    Room room;
    std::memset(room.escapes, 0, sizeof room.escapes);
    for (size_t b = 0; b < blocks; b++) {
        const uint64_t at = b * SPLIT_NUMBERS * form.item_bytes;
        const size_t n = std::min<uint64_t>(SPLIT_NUMBERS, (nbytes - at) / form.item_bytes);
        SplitRow row;
        std::memcpy(&row, src + b * ROW_BYTES, ROW_BYTES);
        size_t bytes;
        const std::string wrong = wrong_row(form, row, n, offset, body_bytes - offset, bytes);
        if (!wrong.empty()) return "block " + std::to_string(b) + ": " + wrong;
        if (!decode_block(form, row, src + body + offset, bytes, dst + at, n, room)) {
            return "block " + std::to_string(b) + ": its codes have another number of escapes than its row, " +
                   std::to_string(row.escapes);
        }
        offset += bytes;
    }
    if (offset != body_bytes) return std::to_string(body_bytes - offset) + " bytes follow the last block";
    std::memcpy(dst + nbytes - tail, src + src_bytes - tail, tail);
    kernels().store_fence();
    return "";
}

uint64_t split_encode(nb::object src, nb::object dst, unsigned dtype) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    to.require_writable("dst");
    const Form form = form_of(dtype);
    if (from.nbytes() > UINT32_MAX) throw std::invalid_argument("src: 4 GiB and more are not possible");
    return run_freed(from.nbytes(), [&] { return encode(form, from.base(), from.nbytes(), to.base(), to.nbytes()); });
}

std::string split_decode(nb::object src, nb::object dst, unsigned dtype) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    to.require_writable("dst");
    const Form form = form_of(dtype);
    return run_freed(to.nbytes(), [&] { return decode(form, from.base(), from.nbytes(), to.base(), to.nbytes()); });
}

}  // namespace

void bind_split(nb::module_ &m) {
    m.def("split_encode", &split_encode, nb::arg("src"), nb::arg("dst"), nb::arg("dtype"));
    m.def("split_decode", &split_decode, nb::arg("src"), nb::arg("dst"), nb::arg("dtype"));
}

}  // namespace lmpipe
