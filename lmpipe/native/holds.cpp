// Holds: a reader's promise, in its own shared table, that it is reading a slot.
//
//     slot state word    generation << 8 | state                        (generation starts at 1)
//     hold entry         word 0: slot << 32 | generation, 0 when free   word 1: request
//
// The reader publishes the entry, fences, and reads the state word again. The evictor changes the state word, fences,
// and scans the tables. Both fences are seq_cst, so in their one total order the later side sees what the earlier side
// wrote: either the reader sees the slot doomed and lets go, or the evictor sees the hold and leaves the slot alone.
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "region.h"

namespace lmpipe {
namespace {

using Word = std::atomic_ref<uint64_t>;

constexpr uint64_t ENTRY_BYTES = 16;
// So many holds are published under one fence: few enough that what a failed one drags along is short-lived, enough
// that the fence and the cache misses on the state words are shared.
constexpr size_t BATCH = 64;

class Headers {
   public:
    Headers(nb::object buffer, uint64_t offset_bytes, uint64_t stride_bytes, uint64_t count)
        : region_(Region::of_buffer(buffer, "buffer")), stride_bytes_(stride_bytes), count_(count) {
        if (stride_bytes < sizeof(uint64_t) || stride_bytes % sizeof(uint64_t) != 0) {
            throw std::invalid_argument("stride_bytes: a positive multiple of 8 is needed, this is " +
                                        std::to_string(stride_bytes));
        }
        if (count > UINT32_MAX || count > region_.nbytes() / stride_bytes + 1) {
            throw std::invalid_argument("count: " + std::to_string(count) + " headers do not fit in " +
                                        std::to_string(region_.nbytes()) + " bytes");
        }
        // The last header needs no more than its state word inside.
        const uint64_t bytes = count ? (count - 1) * stride_bytes + sizeof(uint64_t) : 0;
        base_ = reinterpret_cast<uint8_t *>(region_.words(offset_bytes, bytes, "offset_bytes"));
    }

    uint64_t size() const { return count_; }
    uint64_t *state(uint32_t slot) const { return reinterpret_cast<uint64_t *>(base_ + slot * stride_bytes_); }

   private:
    Region region_;
    uint64_t stride_bytes_, count_;
    uint8_t *base_;
};

class HoldTable {
   public:
    HoldTable(nb::object buffer, uint64_t offset_bytes, uint64_t entries)
        : region_(Region::of_buffer(buffer, "buffer")), entries_(entries) {
        if (entries > UINT32_MAX || entries > region_.nbytes() / ENTRY_BYTES) {
            throw std::invalid_argument("entries: " + std::to_string(entries) + " do not fit in " +
                                        std::to_string(region_.nbytes()) + " bytes");
        }
        region_.require_writable("buffer");
        words_ = region_.words(offset_bytes, entries * ENTRY_BYTES, "offset_bytes");
        taken_.resize(entries);
        free_.reserve(entries);
        // Entry 0 on top, so that a short table scan meets the holds first. One that is in use already stays so: whose
        // reads it guards is not known here, and release() takes it.
        for (uint64_t e = entries; e-- > 0;) {
            taken_[e] = slot_word(e).load(std::memory_order_acquire) != 0;
            if (!taken_[e]) free_.push_back(static_cast<uint32_t>(e));
        }
    }

    NewVector<uint32_t> take(const Headers &headers, Vector<uint32_t> slots, Vector<uint32_t> generations,
                             uint32_t committed_state, uint64_t request) {
        const size_t n = slots.shape(0);
        if (generations.shape(0) != n) {
            throw std::invalid_argument("generations: " + std::to_string(generations.shape(0)) + " for " + std::to_string(n) +
                                        " slots");
        }
        if (committed_state > 0xFF) {
            throw std::invalid_argument("committed_state: " + std::to_string(committed_state) + " does not fit in 8 bits");
        }
        for (size_t i = 0; i < n; i++) {
            if (slots.data()[i] >= headers.size()) {
                throw std::invalid_argument("slots[" + std::to_string(i) + "]: slot " + std::to_string(slots.data()[i]) +
                                            " of " + std::to_string(headers.size()));
            }
        }
        nb::capsule owner;
        auto *out = new_data<uint32_t>(n, owner);
        std::lock_guard lock(mutex_);
        size_t held = 0;
        while (held < n) {
            const size_t batch = publish(headers, slots.data() + held, generations.data() + held, n - held, request, out + held);
            // The fence of the protocol above: the entries are visible before the states are read.
            std::atomic_thread_fence(std::memory_order_seq_cst);
            const size_t good =
                confirm(headers, slots.data() + held, generations.data() + held, batch, committed_state);
            for (size_t i = batch; i-- > good;) put_back(out[held + i]);
            held += good;
            if (good < BATCH) break;
        }
        return vector_of(out, held, owner);
    }

    void release(Vector<uint32_t> entries) {
        const uint32_t *e = entries.data();
        const size_t n = entries.shape(0);
        std::lock_guard lock(mutex_);
        for (size_t i = 0; i < n; i++) {
            if (e[i] < entries_ && taken_[e[i]]) {
                taken_[e[i]] = false;  // found again, in this very call, it is a double release too
                continue;
            }
            for (size_t k = 0; k < i; k++) taken_[e[k]] = true;
            throw std::invalid_argument("entries[" + std::to_string(i) + "]: " + std::to_string(e[i]) +
                                        (e[i] < entries_ ? " is not taken" : " is past the table's end") +
                                        "; nothing was released");
        }
        for (size_t i = n; i-- > 0;) put_back(e[i]);
    }

    uint64_t free_entries() {
        std::lock_guard lock(mutex_);
        return free_.size();
    }

   private:
    Word slot_word(uint64_t entry) const { return Word(words_[2 * entry]); }
    Word request_word(uint64_t entry) const { return Word(words_[2 * entry + 1]); }

    size_t publish(const Headers &headers, const uint32_t *slots, const uint32_t *generations, size_t n, uint64_t request,
                   uint32_t *out) {
        size_t batch = n < BATCH ? n : BATCH;
        if (batch > free_.size()) batch = free_.size();
        for (size_t i = 0; i < batch; i++) {
            __builtin_prefetch(headers.state(slots[i]));
            const uint32_t entry = free_.back();
            free_.pop_back();
            taken_[entry] = true;
            request_word(entry).store(request, std::memory_order_relaxed);
            // Release: whoever sees the hold sees whose request it is.
            slot_word(entry).store(static_cast<uint64_t>(slots[i]) << 32 | generations[i], std::memory_order_release);
            out[i] = entry;
        }
        return batch;
    }

    static size_t confirm(const Headers &headers, const uint32_t *slots, const uint32_t *generations, size_t batch,
                          uint32_t committed_state) {
        for (size_t i = 0; i < batch; i++) {
            // Generations start at 1; the low half of one that wrapped to 0 could make the entry read as free.
            if (generations[i] == 0) return i;
            // Acquire: the payload that this generation's commit published is visible to the reads that follow.
            const uint64_t state = Word(*headers.state(slots[i])).load(std::memory_order_acquire);
            if ((state & 0xFF) != committed_state || static_cast<uint32_t>(state >> 8) != generations[i]) return i;
        }
        return batch;
    }

    // Release: the reads that the hold guarded are done before the evictor can see it gone.
    void put_back(uint32_t entry) {
        slot_word(entry).store(0, std::memory_order_release);
        taken_[entry] = false;
        free_.push_back(entry);
    }

    Region region_;
    uint64_t entries_;
    uint64_t *words_;
    std::mutex mutex_;  // guards free_ and taken_; never held across Python code
    std::vector<uint32_t> free_;
    std::vector<bool> taken_;
};

}  // namespace

void bind_holds(nb::module_ &m) {
    nb::class_<Headers>(m, "Headers")
        .def(nb::init<nb::object, uint64_t, uint64_t, uint64_t>(), nb::arg("buffer"), nb::arg("offset_bytes"),
             nb::arg("stride_bytes"), nb::arg("count"))
        .def("__len__", &Headers::size);
    nb::class_<HoldTable>(m, "HoldTable")
        .def(nb::init<nb::object, uint64_t, uint64_t>(), nb::arg("buffer"), nb::arg("offset_bytes"), nb::arg("entries"))
        .def("take", &HoldTable::take, nb::arg("headers"), nb::arg("slots").noconvert(), nb::arg("generations").noconvert(),
             nb::arg("committed_state"), nb::arg("request"))
        .def("release", &HoldTable::release, nb::arg("entries").noconvert())
        .def_prop_ro("free", &HoldTable::free_entries);
}

}  // namespace lmpipe
