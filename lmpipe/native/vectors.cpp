// The codecs of vectors as Python sees them: bodies of encoded chunks, whose lengths are checked here.
#include <cfenv>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "levels.h"
#include "region.h"

namespace lmpipe {
namespace {

// The kernels' arithmetic is the default one, whatever the calling thread has set: an engine may flush small numbers.
class DefaultArithmetic {
   public:
    DefaultArithmetic() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&before_); }
    DefaultArithmetic(const DefaultArithmetic &) = delete;
    DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;

   private:
    std::fenv_t before_;
};

void require_bytes(const Region &region, uint64_t bytes, const char *argument) {
    if (region.nbytes() != bytes) {
        throw std::invalid_argument(std::string(argument) + ": " + std::to_string(bytes) + " bytes are needed, these are " +
                                    std::to_string(region.nbytes()));
    }
}

// How many vectors `numbers` are.
size_t vectors_of(const Region &numbers, unsigned dtype, uint64_t dim, const char *argument) {
    if (dtype != BF16 && dtype != FP16 && dtype != FP32) {
        throw std::invalid_argument("dtype: 1 to 3 are possible, this is " + std::to_string(dtype));
    }
    if (dim < 1 || dim > MAX_HEAD_DIM) {
        throw std::invalid_argument("dim: 1 to " + std::to_string(MAX_HEAD_DIM) + " are possible, this is " +
                                    std::to_string(dim));
    }
    const uint64_t vector_bytes = dim * (dtype == FP32 ? 4 : 2);
    if (numbers.nbytes() % vector_bytes) {
        throw std::invalid_argument(std::string(argument) + ": " + std::to_string(numbers.nbytes()) +
                                    " bytes are not a whole number of vectors of " + std::to_string(vector_bytes));
    }
    return numbers.nbytes() / vector_bytes;
}

bool fp8_encode(nb::object src, unsigned dtype, uint64_t dim, nb::object dst) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    const size_t n = vectors_of(from, dtype, dim, "src");
    to.require_writable("dst");
    require_bytes(to, n + n * dim, "dst");
    return run_freed(from.nbytes(), [&] {
        const DefaultArithmetic arithmetic;
        return kernels().fp8_encode(from.base(), dtype, n, dim, to.base(), to.base() + n);
    });
}

bool fp8_decode(nb::object src, unsigned dtype, uint64_t dim, nb::object dst) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    const size_t n = vectors_of(to, dtype, dim, "dst");
    to.require_writable("dst");
    require_bytes(from, n + n * dim, "src");
    return run_freed(to.nbytes(), [&] {
        const DefaultArithmetic arithmetic;
        return kernels().fp8_decode(from.base(), from.base() + n, dtype, n, dim, to.base());
    });
}

// A copy of the bits of each vector, which nobody changes while a kernel counts on them.
std::vector<uint8_t> checked_bits(Vector<uint8_t> bits, size_t n, uint64_t dim, uint64_t &body_bytes) {
    if (bits.shape(0) != n) {
        throw std::invalid_argument("bits: one for each of " + std::to_string(n) + " vectors is needed, these are " +
                                    std::to_string(bits.shape(0)));
    }
    std::vector<uint8_t> copy(bits.data(), bits.data() + n);
    uint64_t planes = 0;
    bool possible = true;
    for (const uint8_t b : copy) {
        possible &= b == 3 || b == 4 || b == 8;
        planes += b;
    }
    if (!possible) throw std::invalid_argument("bits: 3, 4 and 8 are possible");
    body_bytes = n * 4 + planes * ((dim + 7) / 8);
    return copy;
}

bool rotated_encode(nb::object src, unsigned dtype, uint64_t dim, Vector<uint8_t> bits, nb::object dst) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    const size_t n = vectors_of(from, dtype, dim, "src");
    uint64_t body_bytes = 0;
    const std::vector<uint8_t> each = checked_bits(bits, n, dim, body_bytes);
    to.require_writable("dst");
    require_bytes(to, body_bytes, "dst");
    return run_freed(from.nbytes(), [&] {
        const DefaultArithmetic arithmetic;
        return kernels().rotated_encode(from.base(), dtype, n, dim, each.data(), to.base(), to.base() + 2 * n,
                                        to.base() + 4 * n);
    });
}

bool rotated_decode(nb::object src, unsigned dtype, uint64_t dim, Vector<uint8_t> bits, nb::object dst) {
    const Region from = Region::of_buffer(src, "src"), to = Region::of_buffer(dst, "dst");
    const size_t n = vectors_of(to, dtype, dim, "dst");
    uint64_t body_bytes = 0;
    const std::vector<uint8_t> each = checked_bits(bits, n, dim, body_bytes);
    to.require_writable("dst");
    require_bytes(from, body_bytes, "src");
    return run_freed(to.nbytes(), [&] {
        const DefaultArithmetic arithmetic;
        return kernels().rotated_decode(from.base(), from.base() + 2 * n, from.base() + 4 * n, dtype, n, dim, each.data(),
                                        to.base());
    });
}

}  // namespace

void bind_vectors(nb::module_ &m) {
    m.attr("MAX_HEAD_DIM") = MAX_HEAD_DIM;
    m.def("fp8_encode", &fp8_encode, nb::arg("src"), nb::arg("dtype"), nb::arg("dim"), nb::arg("dst"));
    m.def("fp8_decode", &fp8_decode, nb::arg("src"), nb::arg("dtype"), nb::arg("dim"), nb::arg("dst"));
    m.def("rotated_encode", &rotated_encode, nb::arg("src"), nb::arg("dtype"), nb::arg("dim"),
          nb::arg("bits").noconvert(), nb::arg("dst"));
    m.def("rotated_decode", &rotated_decode, nb::arg("src"), nb::arg("dtype"), nb::arg("dim"),
          nb::arg("bits").noconvert(), nb::arg("dst"));
}

}  // namespace lmpipe
