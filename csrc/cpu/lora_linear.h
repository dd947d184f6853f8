#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "branch.h"
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

// The way of lora_linear_backward.
Way lora_linear_backward_way(const at::Tensor& dy, const at::Tensor& lora_a,
                             const at::Tensor& lora_b, bool drops);

// What dY gives by way of B: U = s dY B [M, r or more] and dB = s dY' (h * g), in one pass if both.
struct FromOutput {
  at::Tensor u, db;
};

FromOutput from_output(Way way, const at::Tensor& dy, const at::Tensor& lora_b,
                       const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& gate,
                       double scaling, bool needs_u, bool needs_b);

// dA = dH' drop(x) in A's dtype, for a dH packed or of r columns.
at::Tensor grad_a(Way way, const Dropped& x, const at::Tensor& dh, const at::Tensor& lora_a);

// dX = dY W + drop(dH A), or what there is of it without a weight, for a packed dH.
at::Tensor lora_linear_grad_x(Way way, const at::Tensor& dy,
                              const std::optional<at::Tensor>& weight, const at::Tensor& dh,
                              const at::Tensor& lora_a, const std::optional<at::Tensor>& mask,
                              double p);

}  // namespace lora_kernels
