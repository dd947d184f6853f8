// A chain of gates on pairs of axes of x, and its backward pass.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace lora_kernels {

void gate_chain(at::Tensor& out, const at::Tensor& x, at::TensorList gates, at::IntArrayRef dims,
                bool add);

void gate_chain_backward(const at::Tensor& dy, const at::Tensor& x, at::TensorList gates,
                         at::IntArrayRef dims, const std::optional<at::Tensor>& dx, bool add,
                         at::TensorList grads);

}  // namespace lora_kernels
