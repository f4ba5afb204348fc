#include "levels.h"

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace lmpipe {
namespace {

#define LMPIPE_TABLE(level)                                                                              \
    Kernels{#level,                 level::blake3_lanes,   level::copy_stores, level::blake3_many,       \
            level::blake3_chain,    level::xxh3_accumulate, level::copy_runs,  level::store_fence,       \
            level::split_encode,    level::split_decode,   level::fp8_encode,  level::fp8_decode,        \
            level::rotated_encode,  level::rotated_decode}

const Kernels generic_table = LMPIPE_TABLE(generic);
#ifdef LMPIPE_X86_LEVELS
const Kernels avx2_table = LMPIPE_TABLE(avx2);
const Kernels avx512_table = LMPIPE_TABLE(avx512);

Kernels with_vbmi2(Kernels table) {
    table.name = "avx512vbmi2";
    table.split_encode = avx512vbmi2::split_encode;
    table.split_decode = avx512vbmi2::split_decode;
    return table;
}

const Kernels avx512vbmi2_table = with_vbmi2(avx512_table);

// The levels are compiled for x86-64-v3 and -v4, so all that those promise has to be there (and saved by the operating
// system, which __builtin_cpu_supports looks at as well). clang before 17 cannot ask for F16C, LZCNT and MOVBE; no CPU
// with AVX2, BMI2 and FMA lacks them.
bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma");
}

bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

bool runs_avx512vbmi2() {
    return runs_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

const Kernels *best() {
    const Kernels *levels[4];
    return levels[usable_levels(levels) - 1];
}

std::atomic<const Kernels *> &current() {
    static std::atomic<const Kernels *> table{best()};
    return table;
}

}  // namespace

size_t usable_levels(const Kernels *out[4]) {
    size_t n = 0;
    out[n++] = &generic_table;
#ifdef LMPIPE_X86_LEVELS
    __builtin_cpu_init();
    if (runs_avx2()) out[n++] = &avx2_table;
    if (runs_avx512()) out[n++] = &avx512_table;
    if (runs_avx512vbmi2()) out[n++] = &avx512vbmi2_table;
#endif
    return n;
}

const Kernels &kernels() { return *current().load(std::memory_order_acquire); }

bool set_level(const char *name) {
    const Kernels *levels[4];
    size_t n = usable_levels(levels);
    for (size_t i = 0; i < n; i++) {
        if (std::strcmp(levels[i]->name, name) == 0) {
            current().store(levels[i], std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace lmpipe
