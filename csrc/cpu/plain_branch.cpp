#include "plain_branch.h"

#include "dropout.h"
#include "math_type.h"
#include "products.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

constexpr int64_t kFewRows = 8, kNarrow = 32;

// x without what is dropped, and what the rest is scaled by: the product is the smaller tensor.
std::pair<Tensor, double> kept(const Dropped& x) {
  if (keep_bits(x.mask).data == nullptr) return {x.x, 1.0};
  return {dropped(x.x.to(math_of(x.x.scalar_type())), *x.mask), 1.0 / (1.0 - x.p)};
}

Tensor scaled(Tensor product, double scale, at::ScalarType dtype) {
  return (scale == 1.0 ? product : product.mul_(scale)).to(dtype);
}

}  // namespace

Tensor plain_shrink(const Dropped& x, const Tensor& lora_a) {
  const auto [input, scale] = kept(x);
  const Tensor h = product(Way::kTorch, input, lora_a.to(input.scalar_type()).t());
  return scaled(h, scale, x.x.scalar_type());
}

Tensor plain_grad_a(const Dropped& x, const Tensor& dh, const Tensor& lora_a) {
  const auto [input, scale] = kept(x);
  const Tensor da = product(Way::kTorch, dh.to(input.scalar_type()).t(), input);
  return scaled(da, scale, lora_a.scalar_type());
}

// Of a narrow V the product reads dY along its rows, and what is transposed after it is small.
Tensor plain_grad_b(const Tensor& dy, const Tensor& vectors, const Tensor& lora_b, double scaling) {
  const auto dtype = lora_b.scalar_type();
  if (dy.size(0) < kFewRows || vectors.size(1) > kNarrow) {
    return product(Way::kTorch, dy.t(), vectors, scaling).to(dtype);
  }
  return product(Way::kTorch, vectors.t(), dy, scaling).to(dtype).t().contiguous();
}

Tensor plain_expand_dropped(const Tensor& dh, const Tensor& lora_a, const Tensor& mask, double p,
                            at::ScalarType dtype) {
  const auto math = math_of(dtype);
  const Tensor vectors = dh.to(math).mul(1.0 / (1.0 - p));
  return dropped(product(Way::kTorch, vectors, lora_a.to(math)), mask).to(dtype);
}

}  // namespace lora_kernels
