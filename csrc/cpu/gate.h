// A gate on the rank: one vector for all rows, or one of each row.
#pragma once

#include <ATen/ATen.h>

#include "tensors.h"

namespace lora_kernels {

// h * g, or h where there is no gate.
inline at::Tensor gated(const at::Tensor& h, const OptTensor& gate) {
  return has(gate) ? h.mul(gate->to(h.scalar_type())) : h;
}

// dg of U and h, in the gate's dtype.
inline at::Tensor grad_gate(const at::Tensor& u, const at::Tensor& h, const at::Tensor& gate) {
  const at::Tensor grad = u.mul(h.to(u.scalar_type()));
  return (gate.dim() == 1 ? grad.sum(0) : grad).to(gate.scalar_type());
}

}  // namespace lora_kernels
