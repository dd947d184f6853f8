#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

// Packed keep bits, uint8 [rows, ceil(cols/8)]; the same bits as reference/dropout.py for a seed.
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double p);

// keep / (1 - p) as a tensor like `like`, for what has to be differentiated.
at::Tensor dropout_scale(const at::Tensor& like, const at::Tensor& mask, double p);

}  // namespace lora_kernels
