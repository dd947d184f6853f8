#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace lora_kernels {

// lora_linear with its own backward node; x has any leading dimensions.
at::Tensor lora_linear_autograd(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const at::Tensor& lora_a, const at::Tensor& lora_b,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& gate,
                                const std::optional<at::Tensor>& x_lora, double scaling,
                                double dropout_p);

}  // namespace lora_kernels
