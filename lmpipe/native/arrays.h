// NumPy arrays as arguments and results. Arguments bind with .noconvert(): a converted copy would hide a wrong dtype and
// lose what is written to it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace lmpipe {

namespace nb = nanobind;

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
using NewVector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
using NewDigests = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

template <typename T>
T *new_data(size_t n, nb::capsule &owner) {
    T *data = new T[n ? n : 1];
    owner = nb::capsule(data, [](void *p) noexcept { delete[] static_cast<T *>(p); });
    return data;
}

template <typename T>
NewVector<T> vector_of(T *data, size_t n, const nb::capsule &owner) {
    return NewVector<T>(data, {n}, owner);
}

inline NewDigests digests_of(uint8_t *data, size_t n, size_t digest_bytes, const nb::capsule &owner) {
    return NewDigests(data, {n, digest_bytes}, owner);
}

}  // namespace lmpipe
