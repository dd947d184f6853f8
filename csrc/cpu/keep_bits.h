// Dropout on packed keep bits: bit k % 8 of byte k / 8 is column k.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace lora_kernels {

// out = x * keep * scale, where a dropped element is an exact zero whatever x held.
template <typename Math>
LK_INLINE void drop_row(Math* out, const Math* x, const uint8_t* keep, int64_t cols, Math scale) {
  using Bits = VectorOf<LaneBits<Math>>;
  const Bits lane = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                     1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) {
    const LaneBits<Math> bits = keep[k / 8] | keep[k / 8 + 1] << 8;
    const VectorOf<Math> scaled = vector(x + k) * scale;
    vector(out + k) = (lane & bits) != 0 ? scaled : VectorOf<Math>{};
  }
  for (; k < cols; ++k) out[k] = keep[k / 8] >> (k % 8) & 1 ? x[k] * scale : 0;
}

}  // namespace lora_kernels
