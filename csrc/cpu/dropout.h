#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

// Packed keep bits, uint8 [rows, ceil(cols/8)]; the same bits as reference/dropout.py for a seed.
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double p);

// x * keep / (1 - p) for packed keep bits.
at::Tensor dropout_apply(const at::Tensor& x, const at::Tensor& mask, double p);

// The same in place; x is contiguous.
void dropout_apply_(at::Tensor& x, const at::Tensor& mask, double p);

}  // namespace lora_kernels
