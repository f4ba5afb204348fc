// An engine's paged KV memory, and the transfer of whole chunks between its pages and payloads.
//
//     a payload    plane 0: page page page ...  plane 1: page page page ...  ...
//
// The planes (a layer's K, a layer's V, ...) follow each other, in each the chunk's pages in the prompt's order.
#pragma once

#include <cstdint>
#include <vector>

#include "crew.h"
#include "region.h"

namespace lmpipe {

struct Plane {
    uint8_t *base;
    uint64_t page_stride, page_bytes;
    uint64_t page_start;  // sum of page_bytes of the planes before this one
};

class PagePool {
   public:
    PagePool(std::vector<Region> regions, const uint32_t *plane_region, const uint64_t *plane_offset,
             const uint64_t *page_stride, const uint64_t *page_bytes, size_t planes, uint64_t pages);

    const std::vector<Plane> &planes() const { return planes_; }
    uint64_t pages() const { return pages_; }
    uint64_t bytes_per_page() const { return bytes_per_page_; }  // of all planes
    void require_writable() const;

   private:
    std::vector<Region> regions_;
    std::vector<Plane> planes_;
    uint64_t pages_, bytes_per_page_ = 0;
};

enum class Direction { gather, scatter };

// One gather or scatter of several chunks. Everything is checked by the constructor (std::invalid_argument), before a
// byte moves; the page ids are copied, so that nobody can change them in between.
class Transfer final : public Job {
   public:
    Transfer(Direction direction, const PagePool &pool, const int32_t *page_ids, size_t chunks, size_t pages_per_chunk,
             const Region &payload, const uint64_t *payload_offsets);

    uint64_t bytes() const { return bytes_; }
    void piece(uint64_t index) noexcept override;

   private:
    class Runs;

    void check_ids() const;
    void cut();
    void add_cut(uint64_t index, Runs &runs) const;

    Direction direction_;
    const PagePool &pool_;
    std::vector<int32_t> page_ids_;
    size_t chunks_, pages_per_chunk_;
    std::vector<uint8_t *> payloads_;
    uint64_t bytes_ = 0;
    // A cut is a part of one plane of one chunk, a piece is some cuts in a row. Per plane: the bytes of a cut, and how
    // many cuts of a chunk the planes before it have.
    std::vector<uint64_t> cut_bytes_, first_cut_;
    uint64_t cuts_per_chunk_ = 0, cuts_per_piece_ = 1;
};

}  // namespace lmpipe
