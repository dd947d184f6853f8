// What branch.h does, in matrix products and without packing: for ranks at which a product is
// faster than a pass over the activation.
#pragma once

#include <ATen/ATen.h>

#include "branch.h"

namespace lora_kernels {

// drop(x) A' [M, r], in x's dtype.
at::Tensor plain_shrink(const Dropped& x, const at::Tensor& lora_a);

// dA = dH' drop(x), in A's dtype.
at::Tensor plain_grad_a(const Dropped& x, const at::Tensor& dh, const at::Tensor& lora_a);

// dB = s dY' V, in B's dtype.
at::Tensor plain_grad_b(const at::Tensor& dy, const at::Tensor& vectors, const at::Tensor& lora_b,
                        double scaling);

// drop(dH A) of `dtype`.
at::Tensor plain_expand_dropped(const at::Tensor& dh, const at::Tensor& lora_a,
                                const at::Tensor& mask, double p, at::ScalarType dtype);

}  // namespace lora_kernels
