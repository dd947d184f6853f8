#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

at::Tensor low_rank_norm(const at::Tensor& weight, const at::Tensor& lora_a,
                         const at::Tensor& lora_b, double scaling);

}  // namespace lora_kernels
