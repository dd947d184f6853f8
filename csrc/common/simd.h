// What loops are written with whatever the width of a register; cpu/lanes.h has the vectors.
#pragma once

#include <cstdint>

// What a loop calls has to be inlined: it is compiled for the same instructions then.
#define LK_INLINE inline __attribute__((always_inline))
#define LK_LAMBDA __attribute__((always_inline))

namespace lora_kernels {

// What ranks and buffers are padded to: whole vectors, whatever the width of a register.
constexpr int64_t kLanes = 16;

}  // namespace lora_kernels
