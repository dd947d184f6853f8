#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace lora_kernels {

// y = x W' + b + s (x A') C' B' with gradients of x and C alone.
at::Tensor cored_linear_autograd(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
                                 const at::Tensor& core, const at::Tensor& lora_b, double scaling);

// y = x W' + b + (P x) D for D [width, out] and the sums P x of every width-th feature, with
// gradients of x and D alone.
at::Tensor folded_linear_autograd(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& columns);

}  // namespace lora_kernels
