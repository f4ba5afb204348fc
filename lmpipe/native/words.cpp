// 64-bit words in shared memory, read and written whole by any number of processes.
#include <atomic>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "region.h"

namespace lmpipe {
namespace {

using Word = std::atomic_ref<uint64_t>;
static_assert(Word::is_always_lock_free, "a lock would be this process's own, and shared words are not");

class Words {
   public:
    Words(nb::object buffer, uint64_t offset_bytes, uint64_t count)
        : region_(Region::of_buffer(buffer, "buffer")), count_(count) {
        if (count > region_.nbytes() / sizeof(uint64_t)) {
            throw std::invalid_argument("count: " + std::to_string(count) + " words do not fit in " +
                                        std::to_string(region_.nbytes()) + " bytes");
        }
        words_ = region_.words(offset_bytes, count * sizeof(uint64_t), "offset_bytes");
    }

    uint64_t size() const { return count_; }

    // Acquire and release: what was written before a store is seen by whoever loads the stored value. The read-modify-
    // writes are seq_cst: two processes that each write one word and read the other's cannot both miss (see fence()).
    uint64_t load(uint64_t i) const { return at(i).load(std::memory_order_acquire); }
    void store(uint64_t i, uint64_t value) { writable_at(i).store(value, std::memory_order_release); }
    uint64_t exchange(uint64_t i, uint64_t value) { return writable_at(i).exchange(value, std::memory_order_seq_cst); }
    bool cas(uint64_t i, uint64_t expected, uint64_t desired) {
        return writable_at(i).compare_exchange_strong(expected, desired, std::memory_order_seq_cst);
    }
    uint64_t fetch_add(uint64_t i, uint64_t v) { return writable_at(i).fetch_add(v, std::memory_order_seq_cst); }
    uint64_t fetch_or(uint64_t i, uint64_t v) { return writable_at(i).fetch_or(v, std::memory_order_seq_cst); }
    uint64_t fetch_and(uint64_t i, uint64_t v) { return writable_at(i).fetch_and(v, std::memory_order_seq_cst); }

    NewVector<uint64_t> snapshot() const {
        nb::capsule owner;
        auto *out = new_data<uint64_t>(count_, owner);
        for (uint64_t i = 0; i < count_; i++) out[i] = Word(words_[i]).load(std::memory_order_relaxed);
        // One fence for all of them: whatever was released before any value read here is now visible.
        std::atomic_thread_fence(std::memory_order_acquire);
        return vector_of(out, count_, owner);
    }

   private:
    Word at(uint64_t i) const {
        if (i >= count_) {
            throw std::invalid_argument("i: word " + std::to_string(i) + " of " + std::to_string(count_));
        }
        return Word(words_[i]);
    }
    Word writable_at(uint64_t i) const {
        region_.require_writable("buffer");
        return at(i);
    }

    Region region_;
    uint64_t count_;
    uint64_t *words_;
};

}  // namespace

void bind_words(nb::module_ &m) {
    nb::class_<Words>(m, "Words")
        .def(nb::init<nb::object, uint64_t, uint64_t>(), nb::arg("buffer"), nb::arg("offset_bytes"), nb::arg("count"))
        .def("__len__", &Words::size)
        .def("load", &Words::load, nb::arg("i"))
        .def("store", &Words::store, nb::arg("i"), nb::arg("v"))
        .def("exchange", &Words::exchange, nb::arg("i"), nb::arg("v"))
        .def("cas", &Words::cas, nb::arg("i"), nb::arg("expected"), nb::arg("desired"))
        .def("fetch_add", &Words::fetch_add, nb::arg("i"), nb::arg("v"))
        .def("fetch_or", &Words::fetch_or, nb::arg("i"), nb::arg("v"))
        .def("fetch_and", &Words::fetch_and, nb::arg("i"), nb::arg("v"))
        .def("snapshot", &Words::snapshot);
    m.def("fence", [] { std::atomic_thread_fence(std::memory_order_seq_cst); });
}

}  // namespace lmpipe
