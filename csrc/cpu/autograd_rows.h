// What the autograd nodes in C++ share: any leading dimensions as rows, and the equation once more.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "dropout.h"

namespace lora_kernels {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline at::Tensor rows(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

// A gate on the rank is one vector for all rows, or has x's leading dimensions.
inline at::Tensor gate_rows(const at::Tensor& gate) {
  return gate.defined() && gate.dim() == 1 ? gate : rows(gate);
}

// Rows with the leading dimensions of `like`.
inline at::Tensor with_lead_of(const at::Tensor& matrix, const at::Tensor& like) {
  if (!matrix.defined() || like.dim() == 2) return matrix;
  auto shape = like.sizes().vec();
  shape.back() = matrix.size(-1);
  return matrix.view(shape);
}

// A linear with a branch; what it has not is undefined.
struct Branched {
  at::Tensor x, weight, lora_a, lora_b, gate, x_lora, mask;
  double scaling, p;
};

// The equation in differentiable operations, for a second derivative.
inline at::Tensor composite(const Branched& of) {
  const at::Tensor x = rows(of.x), gate = gate_rows(of.gate);
  at::Tensor branch = of.x_lora.defined() ? rows(of.x_lora) : x;
  if (of.mask.defined()) branch = branch * dropout_scale(branch, of.mask, of.p);
  at::Tensor h = at::mm(branch, of.lora_a.to(x.scalar_type()).t());
  if (gate.defined()) h = h * gate.to(x.scalar_type());
  const at::Tensor delta = at::mm(h, of.lora_b.to(x.scalar_type()).t()) * of.scaling;
  return of.weight.defined() ? at::mm(x, of.weight.t()) + delta : delta;
}

}  // namespace lora_kernels
