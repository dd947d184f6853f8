// Vectors of a fixed number of lanes in the compiler's own notation, which it lowers to what the
// target has (two registers of AVX-512, four of NEON, ...).
#pragma once

#include <cstdint>
#include <type_traits>

// One binary for every x86: the loader picks the widest clone of a function that the machine runs.
// A sanitizer is not there yet when the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define LK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LK_SIMD
#endif
// What a clone calls has to be inlined, or it is compiled for the default target.
#define LK_INLINE inline __attribute__((always_inline))
#define LK_LAMBDA __attribute__((always_inline))

namespace lora_kernels {

constexpr int64_t kLanes = 16;

template <typename Math>
struct VectorType {
  typedef Math type __attribute__((vector_size(kLanes * sizeof(Math)), aligned(sizeof(Math))));
};
template <typename Math>
using VectorOf = typename VectorType<Math>::type;

// The integer as wide as a lane.
template <typename Math>
using LaneBits = std::conditional_t<sizeof(Math) == 4, int32_t, int64_t>;

// The vector that starts at p, which need not be aligned.
template <typename Math>
LK_INLINE VectorOf<Math>& vector(Math* p) {
  return *reinterpret_cast<VectorOf<Math>*>(p);
}

template <typename Math>
LK_INLINE const VectorOf<Math>& vector(const Math* p) {
  return *reinterpret_cast<const VectorOf<Math>*>(p);
}

}  // namespace lora_kernels
