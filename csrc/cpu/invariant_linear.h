// y = x Wᵀ, each row whatever the others are.
#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

at::Tensor invariant_linear(const at::Tensor& x, const at::Tensor& weight);

}  // namespace lora_kernels
