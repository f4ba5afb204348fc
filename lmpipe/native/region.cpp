#include "region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <stdexcept>

namespace lmpipe {

Region Region::of_buffer(nb::handle buffer, const char *argument) {
    auto *view = new Py_buffer;
    bool writable = true;
    if (PyObject_GetBuffer(buffer.ptr(), view, PyBUF_WRITABLE) != 0) {
        PyErr_Clear();
        writable = false;
        if (PyObject_GetBuffer(buffer.ptr(), view, PyBUF_SIMPLE) != 0) {
            delete view;
            PyErr_Clear();
            const std::string type = Py_TYPE(buffer.ptr())->tp_name;
            throw nb::type_error((std::string(argument) + ": a contiguous buffer is needed, this " + type +
                                  " gives none (numpy.ascontiguousarray copies an array into one)")
                                     .c_str());
        }
    }
    Region region;
    region.base_ = static_cast<uint8_t *>(view->buf);
    region.nbytes_ = static_cast<uint64_t>(view->len);
    region.writable_ = writable;
    region.owner_ = std::shared_ptr<void>(view, [](void *p) {
        auto *held = static_cast<Py_buffer *>(p);
        PyBuffer_Release(held);
        delete held;
    });
    return region;
}

Region Region::at(uint64_t address, uint64_t nbytes, bool writable, nb::object owner) {
    if (address == 0 && nbytes != 0) throw std::invalid_argument("address: is 0, so there are no bytes to use");
    if (nbytes > UINT64_MAX - address) throw std::invalid_argument("nbytes: address + nbytes runs past the address space");
    Region region;
    region.base_ = reinterpret_cast<uint8_t *>(address);
    region.nbytes_ = nbytes;
    region.writable_ = writable;
    region.owner_ = std::make_shared<nb::object>(std::move(owner));
    return region;
}

uint8_t *Region::range(uint64_t offset, uint64_t nbytes, const char *argument) const {
    if (offset > nbytes_ || nbytes > nbytes_ - offset) {
        throw std::invalid_argument(std::string(argument) + ": " + std::to_string(nbytes) + " bytes at offset " +
                                    std::to_string(offset) + " do not fit in memory of " + std::to_string(nbytes_) + " bytes");
    }
    return base_ + offset;
}

uint64_t *Region::words(uint64_t offset, uint64_t nbytes, const char *argument) const {
    uint8_t *place = range(offset, nbytes, argument);
    if (reinterpret_cast<uintptr_t>(place) % alignof(uint64_t) != 0) {
        throw std::invalid_argument(std::string(argument) + ": offset " + std::to_string(offset) +
                                    " is not 8-byte aligned in memory, so its words cannot be read whole");
    }
    return reinterpret_cast<uint64_t *>(place);
}

void Region::require_writable(const char *argument) const {
    if (!writable_) {
        throw std::invalid_argument(std::string(argument) + ": the memory is read-only; map it or pass it writable");
    }
}

namespace {

// For kernels without MADV_POPULATE_* (Linux before 5.14). Adding nothing dirties a page and loses nobody's bytes.
void touch(uint8_t *first, uint8_t *last, bool write, size_t page_bytes) {
    for (uint8_t *page = first; page < last; page += page_bytes) {
        std::atomic_ref<uint8_t> byte(*page);
        if (write) {
            byte.fetch_add(0, std::memory_order_relaxed);
        } else {
            (void)byte.load(std::memory_order_relaxed);
        }
    }
}

}  // namespace

int populate(const Region &region, uint64_t offset, uint64_t nbytes, bool write) {
    uint8_t *start = region.range(offset, nbytes, "nbytes");
    if (write) region.require_writable("region");
    if (nbytes == 0) return 0;
    const auto page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(start) / page_bytes * page_bytes;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + nbytes + page_bytes - 1) / page_bytes * page_bytes;
#if defined(MADV_POPULATE_READ) && defined(MADV_POPULATE_WRITE)
    constexpr int read_advice = MADV_POPULATE_READ, write_advice = MADV_POPULATE_WRITE;
#elif defined(__linux__)
    constexpr int read_advice = 22, write_advice = 23;  // since Linux 5.14; older headers lack the names
#endif
#if defined(__linux__)
    int rc;
    do {
        rc = madvise(reinterpret_cast<void *>(first), last - first, write ? write_advice : read_advice);
    } while (rc != 0 && errno == EINTR);
    if (rc == 0) return 0;
    if (errno != EINVAL) return errno;
#endif
    touch(reinterpret_cast<uint8_t *>(first), reinterpret_cast<uint8_t *>(last), write, page_bytes);
    return 0;
}

void bind_region(nb::module_ &m) {
    nb::class_<Region>(m, "Region")
        .def(
            "__init__", [](Region *self, nb::object buffer) { new (self) Region(Region::of_buffer(buffer, "buffer")); },
            nb::arg("buffer"))
        .def_static("at", &Region::at, nb::arg("address"), nb::arg("nbytes"), nb::arg("writable"), nb::arg("owner").none())
        .def_prop_ro("address", [](const Region &r) { return reinterpret_cast<uint64_t>(r.base()); })
        .def_prop_ro("nbytes", &Region::nbytes)
        .def_prop_ro("writable", &Region::writable);

    m.def(
        "populate",
        [](const Region &region, uint64_t offset, uint64_t nbytes, bool write) {
            int error;
            {
                nb::gil_scoped_release free;
                error = populate(region, offset, nbytes, write);
            }
            if (error != 0) {
                errno = error;
                PyErr_SetFromErrno(PyExc_OSError);
                throw nb::python_error();
            }
        },
        nb::arg("region"), nb::arg("offset"), nb::arg("nbytes"), nb::arg("write"));
}

}  // namespace lmpipe
