// lmpipe.native._native: hashing, shared words, holds, copies.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "levels.h"
#include "region.h"

namespace nb = nanobind;

namespace lmpipe {
namespace {

nb::dict features() {
    const Kernels *levels[4];
    const size_t n = usable_levels(levels);
    std::string names;
    for (size_t i = 0; i < n; i++) names += (i ? " " : "") + std::string(levels[i]->name);
    const Kernels &k = kernels();
    nb::dict d;
    d["level"] = k.name;
    d["levels"] = names;
    d["blake3"] = std::to_string(k.blake3_lanes) + " lanes";
    d["copy"] = std::string(k.copy_stores) + " stores";
#if defined(__clang__)
    d["compiler"] = "clang " __clang_version__;
#else
    d["compiler"] = "gcc " __VERSION__;
#endif
#ifdef __linux__
    d["madvise_populate"] = true;
#else
    d["madvise_populate"] = false;
#endif
    return d;
}

void choose_level(const std::string &name) {
    if (!set_level(name.c_str())) {
        throw std::invalid_argument("name: '" + name + "' is no level that this CPU can run; features()['levels'] lists them");
    }
}

}  // namespace
}  // namespace lmpipe

NB_MODULE(_native, m) {
    // Objects held by module globals outlive the module at exit; nothing leaks that the process does not give back.
    nb::set_leak_warnings(false);
    lmpipe::bind_region(m);
    lmpipe::bind_hash(m);
    lmpipe::bind_words(m);
    lmpipe::bind_holds(m);
    lmpipe::bind_copier(m);
    lmpipe::bind_split(m);
    lmpipe::bind_vectors(m);
    m.def("features", &lmpipe::features);
    m.def("_set_level", &lmpipe::choose_level, nb::arg("name"));
}
