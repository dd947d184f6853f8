// Keep bits and what they do to a row: no torch headers here.
#pragma once

#include <cstdint>

namespace lora_kernels {

// The bytes [begin, end) of a mask: bit k % 8 of byte k / 8 of a row is column k.
void fill_bytes(uint8_t* out, uint64_t seed, int64_t begin, int64_t end, uint32_t limit);

// out = x where a column is kept, and an exact zero elsewhere, whatever x holds there.
void drop(float* out, const float* x, const uint8_t* keep, int64_t cols);
void drop(double* out, const double* x, const uint8_t* keep, int64_t cols);

}  // namespace lora_kernels
