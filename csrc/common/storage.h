// What an element is stored as, and the type that it is summed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace lora_kernels {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// A matrix that is read or written, its rows `stride` apart; data is null where it is not wanted.
struct Matrix {
  void* data;
  Storage storage;
  int64_t stride;
};

LK_INLINE int64_t bytes(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

// Whether what is stored needs no conversion to be summed.
template <typename Math>
LK_INLINE bool stored_as(Storage storage) {
  return storage == (sizeof(Math) == sizeof(double) ? Storage::kDouble : Storage::kFloat);
}

#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using HalfFloat = __fp16;
#else
using HalfFloat = _Float16;
#endif

struct Brain {
  uint16_t bits;
};

LK_INLINE float widen(Brain value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
LK_INLINE float widen(HalfFloat value) { return static_cast<float>(value); }
LK_INLINE float widen(float value) { return value; }
LK_INLINE double widen(double value) { return value; }

LK_INLINE void narrow(Brain* out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  // To nearest, ties to even; a NaN stays one.
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = nan ? uint16_t(0x7FC0) : static_cast<uint16_t>(rounded);
}
LK_INLINE void narrow(HalfFloat* out, float value) { *out = static_cast<HalfFloat>(value); }
LK_INLINE void narrow(float* out, float value) { *out = value; }
LK_INLINE void narrow(double* out, double value) { *out = value; }

}  // namespace lora_kernels
