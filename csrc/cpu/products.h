// Sums of matrix products on tensors, by the loops of panel_pass.h or by the vendor's GEMM.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "ways.h"

namespace lora_kernels {

// L R for L [M, k], one of the left factors by its place among them, and R [k, N].
struct Product {
  size_t left;
  at::Tensor right;
};

// out [M, N] = bias + the sum of its products, or with `add` that sum on top of what `out` holds.
struct ProductSum {
  at::Tensor out;
  std::optional<at::Tensor> bias;
  std::vector<Product> products;
  bool add = false;
};

// bias + L R + s V F for V [M, r or more] and F [r, N]: what a linear with a branch of a small rank
// is, and its dX. In panels the branch is more columns of L; the vendor's product is added to it.
at::Tensor branched_product(Way way, const at::Tensor& left, const at::Tensor& right,
                            const std::optional<at::Tensor>& bias, const at::Tensor& vectors,
                            const at::Tensor& factor, double scaling);

// s L R.
at::Tensor product(Way way, const at::Tensor& left, const at::Tensor& right, double scaling = 1.0);

// out += L R.
void accumulate_product(Way way, const at::Tensor& out, const at::Tensor& left,
                        const at::Tensor& right);

// Every sum; a left factor that several of them read is packed once. For float32.
void sum_products(const std::vector<at::Tensor>& lefts, const std::vector<ProductSum>& sums);

}  // namespace lora_kernels
