// Memory that this extension was given: where it is, how long, whether it may be written, and who keeps it mapped.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <string>

namespace lmpipe {

namespace nb = nanobind;

// Work on at least this much gives the interpreter lock up. Below it (0.1 ms) keeping it is the quicker way: to get it
// back from a busy Python thread takes up to a switch interval, 5 ms.
constexpr uint64_t GIL_FREE_BYTES = 1 << 20;

// Runs `work` without the interpreter lock if there are enough bytes in it to be worth it.
template <typename Work>
auto run_freed(uint64_t bytes, Work &&work) {
    if (bytes < GIL_FREE_BYTES) return work();
    nb::gil_scoped_release free;
    return work();
}

// Copies share the owner. The last one has to die with the interpreter lock held, as Python objects that hold it do.
class Region {
   public:
    // From a buffer: TypeError if it is none or not contiguous; read-only buffers give read-only regions.
    static Region of_buffer(nb::handle buffer, const char *argument);
    // From an address; `owner` is kept alive.
    static Region at(uint64_t address, uint64_t nbytes, bool writable, nb::object owner);

    uint8_t *base() const { return base_; }
    uint64_t nbytes() const { return nbytes_; }
    bool writable() const { return writable_; }

    // The place of [offset, offset + nbytes); ValueError names the argument if it does not lie inside.
    uint8_t *range(uint64_t offset, uint64_t nbytes, const char *argument) const;
    // The same for words that are read and written atomically: 8-byte aligned as well.
    uint64_t *words(uint64_t offset, uint64_t nbytes, const char *argument) const;
    void require_writable(const char *argument) const;

   private:
    uint8_t *base_ = nullptr;
    uint64_t nbytes_ = 0;
    bool writable_ = false;
    std::shared_ptr<void> owner_;
};

// Faults the pages of the range in. Returns 0 or an errno.
int populate(const Region &region, uint64_t offset, uint64_t nbytes, bool write);

void bind_region(nb::module_ &m);
void bind_hash(nb::module_ &m);
void bind_words(nb::module_ &m);
void bind_holds(nb::module_ &m);
void bind_copier(nb::module_ &m);
void bind_split(nb::module_ &m);
void bind_vectors(nb::module_ &m);

}  // namespace lmpipe
