// The copies as Python sees them.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "crew.h"
#include "pages.h"
#include "region.h"

namespace lmpipe {
namespace {

constexpr unsigned MAX_THREADS = 256;

// The C library's memcpy, one equal share per thread: the denominator of every copy figure.
class PlainCopy final : public Job {
   public:
    PlainCopy(uint8_t *to, const uint8_t *from, uint64_t bytes, unsigned threads) : to_(to), from_(from), bytes_(bytes) {
        constexpr uint64_t page_bytes = 4096;
        share_bytes_ = std::max((bytes / threads + page_bytes - 1) / page_bytes * page_bytes, page_bytes);
        pieces = (bytes + share_bytes_ - 1) / share_bytes_;
    }
    void piece(uint64_t index) noexcept override {
        const uint64_t at = index * share_bytes_;
        std::memcpy(to_ + at, from_ + at, std::min(share_bytes_, bytes_ - at));
    }

   private:
    uint8_t *to_;
    const uint8_t *from_;
    uint64_t bytes_, share_bytes_;
};

class Copier {
   public:
    explicit Copier(unsigned threads) : crew_(threads) {
        if (threads < 1 || threads > MAX_THREADS) {
            throw std::invalid_argument("threads: 1 to " + std::to_string(MAX_THREADS) + " are possible, these are " +
                                        std::to_string(threads));
        }
    }

    unsigned threads() const { return crew_.threads(); }

    uint64_t gather(const PagePool &pool, Matrix<int32_t> page_ids, const Region &dst, Vector<uint64_t> dst_offsets) {
        return transfer(Direction::gather, pool, page_ids, dst, dst_offsets, "dst_offsets");
    }

    uint64_t scatter(const PagePool &pool, Matrix<int32_t> page_ids, const Region &src, Vector<uint64_t> src_offsets) {
        return transfer(Direction::scatter, pool, page_ids, src, src_offsets, "src_offsets");
    }

    void memcpy(const Region &dst, uint64_t dst_offset, const Region &src, uint64_t src_offset, uint64_t nbytes) {
        uint8_t *to = dst.range(dst_offset, nbytes, "dst_offset");
        const uint8_t *from = src.range(src_offset, nbytes, "src_offset");
        dst.require_writable("dst");
        if (to < from + nbytes && from < to + nbytes) throw std::invalid_argument("src_offset: source and destination overlap");
        PlainCopy job(to, from, nbytes, crew_.threads());
        run(job, nbytes);
    }

   private:
    uint64_t transfer(Direction direction, const PagePool &pool, const Matrix<int32_t> &page_ids, const Region &payload,
                      const Vector<uint64_t> &offsets, const char *argument) {
        const size_t chunks = page_ids.shape(0);
        if (offsets.shape(0) != chunks) {
            throw std::invalid_argument(std::string(argument) + ": " + std::to_string(offsets.shape(0)) + " for " +
                                        std::to_string(chunks) + " chunks");
        }
        Transfer job(direction, pool, page_ids.data(), chunks, page_ids.shape(1), payload, offsets.data());
        run(job, job.bytes());
        return job.bytes();
    }

    // A small job is done here and now: to wake a helper, or to get the interpreter lock back, costs more.
    void run(Job &job, uint64_t bytes) {
        if (bytes < GIL_FREE_BYTES) {
            Crew(1).run(job);
            return;
        }
        crew_.notice_fork();
        nb::gil_scoped_release free;
        crew_.run(job);
    }

    Crew crew_;
};

void init_pool(PagePool *self, nb::list regions, Vector<uint32_t> plane_region, Vector<uint64_t> plane_offset,
               Vector<uint64_t> page_stride, Vector<uint64_t> page_bytes, uint64_t pages) {
    std::vector<Region> held;
    for (nb::handle region : regions) held.push_back(nb::cast<const Region &>(region));
    const size_t planes = plane_region.shape(0);
    const std::pair<const char *, size_t> lengths[] = {
        {"plane_offset", plane_offset.shape(0)}, {"page_stride", page_stride.shape(0)}, {"page_bytes", page_bytes.shape(0)}};
    for (const auto &[argument, length] : lengths) {
        if (length != planes) {
            throw std::invalid_argument(std::string(argument) + ": " + std::to_string(length) + " for " +
                                        std::to_string(planes) + " planes");
        }
    }
    new (self) PagePool(std::move(held), plane_region.data(), plane_offset.data(), page_stride.data(), page_bytes.data(), planes,
                        pages);
}

}  // namespace

void bind_copier(nb::module_ &m) {
    nb::class_<PagePool>(m, "PagePool")
        .def("__init__", &init_pool, nb::arg("regions"), nb::arg("plane_region").noconvert(),
             nb::arg("plane_offset").noconvert(), nb::arg("page_stride").noconvert(), nb::arg("page_bytes").noconvert(),
             nb::arg("pages"))
        .def_prop_ro("pages", &PagePool::pages)
        .def_prop_ro("planes", [](const PagePool &pool) { return pool.planes().size(); })
        .def_prop_ro("bytes_per_page", &PagePool::bytes_per_page);
    nb::class_<Copier>(m, "Copier")
        .def(nb::init<unsigned>(), nb::arg("threads"))
        .def_prop_ro("threads", &Copier::threads)
        .def("gather", &Copier::gather, nb::arg("pool"), nb::arg("page_ids").noconvert(), nb::arg("dst"),
             nb::arg("dst_offsets").noconvert())
        .def("scatter", &Copier::scatter, nb::arg("pool"), nb::arg("page_ids").noconvert(), nb::arg("src"),
             nb::arg("src_offsets").noconvert())
        .def("memcpy", &Copier::memcpy, nb::arg("dst"), nb::arg("dst_offset"), nb::arg("src"), nb::arg("src_offset"),
             nb::arg("nbytes"));
}

}  // namespace lmpipe
