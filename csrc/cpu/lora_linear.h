#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "ways.h"

namespace lora_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_linear(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& x_lora,
    const std::optional<at::Tensor>& seed, double scaling, double dropout_p);

std::vector<at::Tensor> lora_linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& mask, double scaling, double dropout_p, bool separate,
    std::array<bool, 5> needs);

// dX = dY W + drop(dH A), or what there is of it without a weight, for a packed dH.
at::Tensor lora_linear_grad_x(Way way, const at::Tensor& dy,
                              const std::optional<at::Tensor>& weight, const at::Tensor& dh,
                              const at::Tensor& lora_a, const std::optional<at::Tensor>& mask,
                              double p);

}  // namespace lora_kernels
