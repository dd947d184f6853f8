// The LoRA branch on tensors: each function is one pass over one activation, on torch's threads.
// Sums are in float32 (float64 for float64), in an order that no thread count changes.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace lora_kernels {

// drop(x): an activation [M, K] and the packed keep bits of its dropout, if any.
struct Dropped {
  at::Tensor x;
  std::optional<at::Tensor> mask;
  double p;
};

// A small matrix [n, r] of any dtype and strides, as [n, padded rank] in the dtype that an
// activation of `dtype` is summed in.
at::Tensor pack(const at::Tensor& matrix, at::ScalarType dtype);

// The same for a matrix [r, n] that is to be [n, padded rank].
at::Tensor pack_transposed(const at::Tensor& matrix, at::ScalarType dtype);

// A packed [n, padded rank] as [r, n] of `dtype`.
at::Tensor unpack_transposed(const at::Tensor& packed, int64_t rank, at::ScalarType dtype);

// Undoes the padding: [n, r] of `dtype`.
at::Tensor unpack(const at::Tensor& packed, int64_t rank, at::ScalarType dtype);

// drop(x) F, packed [M, R], for a packed F [K, R].
at::Tensor shrink(const Dropped& x, const at::Tensor& factor);

// s drop(x)' V, packed [K, R], for a packed V [M, R].
at::Tensor outer(const Dropped& x, const at::Tensor& vectors, double scaling);

// s x F and s x' V, both packed, from one pass over x.
std::pair<at::Tensor, at::Tensor> shrink_outer(const at::Tensor& x, const at::Tensor& factor,
                                               const at::Tensor& vectors, double scaling);

// What one pass over dY gives of dZ = dY * c, c by column: dZ itself, packed s dZ F and s dZ' V,
// and the column sums of dY * z, where there is a z.
struct UnscaledProducts {
  at::Tensor dz, shrunk, outer, sums;
};

UnscaledProducts unscale_shrink_outer(const at::Tensor& dy, const at::Tensor& scale,
                                      const at::Tensor& z, const at::Tensor& factor,
                                      const at::Tensor& vectors, double scaling);

// out = keep * s V F, or added to what `out` holds; out [M, K] contiguous, V packed, F [r, K].
void expand_into(const at::Tensor& out, const at::Tensor& vectors, const at::Tensor& factor,
                 const std::optional<at::Tensor>& mask, double scaling, bool add);

// drop(V A) of `dtype` [M, K], for a packed V [M, R] and A [r, K].
at::Tensor expand_dropped(const at::Tensor& vectors, const at::Tensor& lora_a,
                          const at::Tensor& mask, double p, at::ScalarType dtype);

// |w_n + s b_n A| for each row n of W [N, K], in what a weight of its dtype is summed in.
at::Tensor row_norms(const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                     double scaling);

}  // namespace lora_kernels
