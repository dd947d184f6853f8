#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace lora_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dora_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scale, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& seed, double scaling, double dropout_p, bool keep_z);

std::vector<at::Tensor> dora_linear_backward(const at::Tensor& dy,
                                             const std::optional<at::Tensor>& x,
                                             const at::Tensor& weight, const at::Tensor& lora_a,
                                             const at::Tensor& lora_b, const at::Tensor& scale,
                                             const std::optional<at::Tensor>& z,
                                             const std::optional<at::Tensor>& h,
                                             const std::optional<at::Tensor>& mask, double scaling,
                                             double dropout_p, std::array<bool, 4> needs);

}  // namespace lora_kernels
