// y = x W' + b + s ((drop(x_lora) A') * g) B' and its gradients on the CPU.
//
// The branch is one pass over each activation (branch.h) and joins the large product: in our own
// loops as r more columns of it (products.h), in the vendor's GEMM by accumulation or as an update.
#include "lora_linear.h"

#include "branch.h"
#include "dropout.h"
#include "products.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

bool has(const OptTensor& tensor) { return tensor.has_value() && tensor->defined(); }

Tensor gated(const Tensor& h, const OptTensor& gate) {
  return has(gate) ? h.mul(gate->to(h.scalar_type())) : h;
}

Tensor grad_gate(const Tensor& u, const Tensor& h, const Tensor& gate) {
  const Tensor grad = u.mul(h);
  return (gate.dim() == 1 ? grad.sum(0) : grad).to(gate.scalar_type());
}

// What dY gives by way of B: packed U = s dY B and dB = s dY' (h * g), in one pass if both.
struct FromOutput {
  Tensor u, db;
};

FromOutput from_output(const Tensor& dy, const Tensor& lora_b, const OptTensor& h,
                       const OptTensor& gate, double scaling, bool needs_u, bool needs_b) {
  const auto dtype = dy.scalar_type();
  const Dropped whole = {dy, std::nullopt, 0.0};
  if (!needs_b && !needs_u) return {};
  if (!needs_b) return {shrink(whole, pack(lora_b, dtype)).mul_(scaling), {}};
  const Tensor vectors = pack(gated(*h, gate), dtype);
  if (!needs_u) return {{}, outer(whole, vectors, scaling)};
  const auto [u, db] = shrink_outer(dy, pack(lora_b, dtype), vectors, scaling);
  return {u, db};
}

// y = x W' + b + s V B'.
Tensor output(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
              const Tensor& vectors, const Tensor& b_t, double scaling) {
  if (has(weight)) return branched_product(x, weight->t(), bias, vectors, b_t, scaling);
  Tensor y = at::mm(vectors, b_t).mul_(scaling);
  return has(bias) ? y.add_(*bias) : y;
}

}  // namespace

// With dropout the branch comes first, for its mask.
Tensor lora_linear_grad_x(const Tensor& dy, const OptTensor& weight, const Tensor& dh,
                          const Tensor& lora_a, const OptTensor& mask, double p) {
  const auto dtype = dy.scalar_type();
  if (has(mask)) {
    Tensor dx = expand_dropped(dh, lora_a, *mask, p, dtype);
    if (has(weight)) accumulate_product(dx, dy, *weight);
    return dx;
  }
  if (has(weight)) return branched_product(dy, *weight, std::nullopt, dh, lora_a, 1.0);
  return at::mm(unpack(dh, lora_a.size(0), dtype), lora_a.to(dtype));
}

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const OptTensor& weight,
                                               const Tensor& lora_a, const Tensor& lora_b,
                                               const OptTensor& bias, const OptTensor& gate,
                                               const OptTensor& x_lora, const OptTensor& seed,
                                               double scaling, double dropout_p) {
  const auto dtype = x.scalar_type();
  const Tensor& read = has(x_lora) ? *x_lora : x;
  const Tensor mask = has(seed) ? dropout_mask(*seed, read.size(0), read.size(1), dropout_p)
                                : at::empty({0}, x.options().dtype(at::kByte));
  const Dropped branch = {read, mask, dropout_p};
  const Tensor h = unpack(shrink(branch, pack_transposed(lora_a, dtype)), lora_a.size(0), dtype);
  const Tensor y = output(x, weight, bias, gated(h, gate), lora_b.to(dtype).t(), scaling);
  return {y, h, mask};
}

std::vector<Tensor> lora_linear_backward(const Tensor& dy, const OptTensor& x,
                                         const OptTensor& weight, const Tensor& lora_a,
                                         const Tensor& lora_b, const OptTensor& h,
                                         const OptTensor& gate, const OptTensor& mask,
                                         double scaling, double dropout_p, bool separate,
                                         std::array<bool, 5> needs) {
  const auto [needs_x, needs_a, needs_b, needs_gate, needs_x_lora] = needs;
  const bool needs_dh = needs_a || needs_gate || needs_x_lora || (needs_x && !separate);
  const auto dtype = dy.scalar_type();
  const auto [u, db] = from_output(dy, lora_b, h, gate, scaling, needs_dh, needs_b);
  const int64_t rank = lora_a.size(0);
  Tensor dh = u;
  if (needs_dh && has(gate)) {
    dh = pack(u.narrow(1, 0, rank).mul(gate->to(u.scalar_type())), dtype);
  }
  std::vector<Tensor> grads;
  if (needs_x && separate) {
    grads.push_back(has(weight) ? at::mm(dy, *weight)
                                : at::zeros({dy.size(0), lora_a.size(1)}, dy.options()));
  } else if (needs_x) {
    grads.push_back(lora_linear_grad_x(dy, weight, dh, lora_a, mask, dropout_p));
  }
  if (needs_a) {
    const Tensor da = outer({*x, mask, dropout_p}, dh, 1.0);
    grads.push_back(unpack_transposed(da, rank, lora_a.scalar_type()));
  }
  if (needs_b) grads.push_back(unpack(db, rank, lora_b.scalar_type()));
  if (needs_gate) {
    grads.push_back(grad_gate(u.narrow(1, 0, rank), h->to(u.scalar_type()), *gate));
  }
  if (needs_x_lora)
    grads.push_back(lora_linear_grad_x(dy, std::nullopt, dh, lora_a, mask, dropout_p));
  return grads;
}

}  // namespace lora_kernels
