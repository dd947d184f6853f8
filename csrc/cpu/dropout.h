#pragma once

#include <ATen/ATen.h>

#include "tensors.h"

namespace lora_kernels {

// Packed keep bits, uint8 [rows, ceil(cols/8)]; the same bits as reference/dropout.py for a seed.
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double p);

// The same with a probability of its own for each row, float32 [rows].
at::Tensor row_dropout_mask(const at::Tensor& seed, const at::Tensor& dropout_ps, int64_t cols);

// The keep bits as the loops read them: none where nothing is dropped, whose mask is absent or
// empty.
struct KeepBits {
  const uint8_t* data = nullptr;
  int64_t stride = 0;
};

inline KeepBits keep_bits(const OptTensor& mask) {
  if (!mask.has_value() || mask->numel() == 0) return {};
  return {mask->const_data_ptr<uint8_t>(), mask->stride(0)};
}

// x * keep for a float32 or float64 x: what is dropped is zero whatever it was.
at::Tensor dropped(const at::Tensor& x, const at::Tensor& mask);

// keep / (1 - p) as a tensor like `like`, for what has to be differentiated.
at::Tensor dropout_scale(const at::Tensor& like, const at::Tensor& mask, double p);

}  // namespace lora_kernels
