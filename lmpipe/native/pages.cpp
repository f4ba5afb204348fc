#include "pages.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "levels.h"

namespace lmpipe {
namespace {

// Large enough that claiming it is nothing, small enough that the threads end together.
constexpr uint64_t PIECE_BYTES = 512 * 1024;

std::string nth(const char *argument, size_t i) { return std::string(argument) + "[" + std::to_string(i) + "]"; }

}  // namespace

PagePool::PagePool(std::vector<Region> regions, const uint32_t *plane_region, const uint64_t *plane_offset,
                   const uint64_t *page_stride, const uint64_t *page_bytes, size_t planes, uint64_t pages)
    : regions_(std::move(regions)), pages_(pages) {
    if (pages == 0 || pages > INT32_MAX) {
        throw std::invalid_argument("pages: 1 to 2147483647 are possible, these are " + std::to_string(pages));
    }
    if (planes == 0) throw std::invalid_argument("plane_region: a pool needs at least one plane");
    for (size_t p = 0; p < planes; p++) {
        if (plane_region[p] >= regions_.size()) {
            throw std::invalid_argument(nth("plane_region", p) + ": region " + std::to_string(plane_region[p]) + " of " +
                                        std::to_string(regions_.size()));
        }
        if (page_bytes[p] == 0) throw std::invalid_argument(nth("page_bytes", p) + ": a page of 0 bytes");
        if (pages > 1 && page_stride[p] < page_bytes[p]) {
            throw std::invalid_argument(nth("page_stride", p) + ": pages of " + std::to_string(page_bytes[p]) + " bytes every " +
                                        std::to_string(page_stride[p]) + " bytes overlap");
        }
        uint64_t extent;
        if (__builtin_mul_overflow(pages - 1, page_stride[p], &extent) ||
            __builtin_add_overflow(extent, page_bytes[p], &extent)) {
            throw std::invalid_argument(nth("page_stride", p) + ": " + std::to_string(pages) + " pages run past 2^64 bytes");
        }
        const Region &region = regions_[plane_region[p]];
        uint8_t *base = region.range(plane_offset[p], extent, nth("plane_offset", p).c_str());
        planes_.push_back({base, page_stride[p], page_bytes[p], bytes_per_page_});
        if (__builtin_add_overflow(bytes_per_page_, page_bytes[p], &bytes_per_page_)) {
            throw std::invalid_argument(nth("page_bytes", p) + ": the planes' pages are together over 2^64 bytes");
        }
    }
}

void PagePool::require_writable() const {
    for (const Region &region : regions_) region.require_writable("pool");
}

Transfer::Transfer(Direction direction, const PagePool &pool, const int32_t *page_ids, size_t chunks, size_t pages_per_chunk,
                   const Region &payload, const uint64_t *payload_offsets)
    : direction_(direction), pool_(pool), page_ids_(page_ids, page_ids + chunks * pages_per_chunk), chunks_(chunks),
      pages_per_chunk_(pages_per_chunk) {
    const bool gathers = direction == Direction::gather;
    if (gathers) {
        payload.require_writable("dst");
    } else {
        pool.require_writable();
    }
    uint64_t chunk_bytes;
    if (__builtin_mul_overflow(pool.bytes_per_page(), pages_per_chunk, &chunk_bytes)) {
        throw std::invalid_argument("page_ids: a chunk of over 2^64 bytes");
    }
    for (size_t c = 0; c < chunks; c++) {
        payloads_.push_back(payload.range(payload_offsets[c], chunk_bytes, nth(gathers ? "dst_offsets" : "src_offsets", c).c_str()));
    }
    check_ids();
    const auto skipped = static_cast<uint64_t>(std::count(page_ids_.begin(), page_ids_.end(), -1));
    bytes_ = (chunks * pages_per_chunk - skipped) * pool.bytes_per_page();
    cut();
}

void Transfer::check_ids() const {
    for (size_t i = 0; i < page_ids_.size(); i++) {
        const int32_t id = page_ids_[i];
        if (id >= 0 && static_cast<uint64_t>(id) < pool_.pages()) continue;
        if (id == -1 && direction_ == Direction::scatter) continue;
        throw std::invalid_argument("page_ids[" + std::to_string(i / pages_per_chunk_) + ", " +
                                    std::to_string(i % pages_per_chunk_) + "]: page " + std::to_string(id) + " of " +
                                    std::to_string(pool_.pages()) +
                                    (id == -1 ? "; -1 (skip) has a meaning in scatter only" : "") + "; nothing was copied");
    }
}

// Cuts are whole pages where a page is smaller than a piece, and parts of one where it is larger. Small cuts make a piece
// together: the kernel reads ahead within one list of runs, so that short lists would wait at each beginning.
void Transfer::cut() {
    for (const Plane &plane : pool_.planes()) {
        const uint64_t whole_pages = std::max<uint64_t>(PIECE_BYTES / plane.page_bytes, 1);
        const uint64_t bytes = plane.page_bytes > PIECE_BYTES ? PIECE_BYTES : whole_pages * plane.page_bytes;
        cut_bytes_.push_back(bytes);
        first_cut_.push_back(cuts_per_chunk_);
        cuts_per_chunk_ += (plane.page_bytes * pages_per_chunk_ + bytes - 1) / bytes;
    }
    if (cuts_per_chunk_ == 0) return;
    const uint64_t mean_bytes = std::max<uint64_t>(pool_.bytes_per_page() * pages_per_chunk_ / cuts_per_chunk_, 1);
    cuts_per_piece_ = std::max<uint64_t>(PIECE_BYTES / mean_bytes, 1);
    pieces = (cuts_per_chunk_ * chunks_ + cuts_per_piece_ - 1) / cuts_per_piece_;
}

// Collects runs and joins those that continue each other on both sides.
class Transfer::Runs {
   public:
    void add(const uint8_t *source, uint8_t *destination, size_t bytes) {
        if (n_) {
            Run &last = runs_[n_ - 1];
            if (last.source + last.bytes == source && last.destination + last.bytes == destination) {
                last.bytes += bytes;
                return;
            }
            if (n_ == CAPACITY) flush();
        }
        runs_[n_++] = {source, destination, bytes};
    }
    void flush() {
        kernels().copy_runs(runs_, n_);
        n_ = 0;
    }

   private:
    static constexpr size_t CAPACITY = 512;  // 64 KiB of the smallest pages: the kernel reads ahead within one list
    Run runs_[CAPACITY];
    size_t n_ = 0;
};

void Transfer::piece(uint64_t index) noexcept {
    const uint64_t first = index * cuts_per_piece_, end = std::min(first + cuts_per_piece_, cuts_per_chunk_ * chunks_);
    Runs runs;
    for (uint64_t cut = first; cut < end; cut++) add_cut(cut, runs);
    runs.flush();
}

void Transfer::add_cut(uint64_t index, Runs &runs) const {
    const uint64_t chunk = index / cuts_per_chunk_, in_chunk = index % cuts_per_chunk_;
    const auto after = std::upper_bound(first_cut_.begin(), first_cut_.end(), in_chunk);
    const auto p = static_cast<size_t>(after - first_cut_.begin()) - 1;
    const Plane &plane = pool_.planes()[p];
    const int32_t *ids = page_ids_.data() + chunk * pages_per_chunk_;
    uint8_t *const block = payloads_[chunk] + plane.page_start * pages_per_chunk_;

    uint64_t at = (in_chunk - first_cut_[p]) * cut_bytes_[p];
    const uint64_t end = std::min(at + cut_bytes_[p], plane.page_bytes * pages_per_chunk_);
    uint64_t page = at / plane.page_bytes, inside = at % plane.page_bytes;
    while (at < end) {
        const uint64_t bytes = std::min(plane.page_bytes - inside, end - at);
        if (ids[page] >= 0) {
            uint8_t *const here = plane.base + static_cast<uint64_t>(ids[page]) * plane.page_stride + inside;
            if (direction_ == Direction::gather) {
                runs.add(here, block + at, bytes);
            } else {
                runs.add(block + at, here, bytes);
            }
        }
        at += bytes;
        page++;
        inside = 0;
    }
}

}  // namespace lmpipe
