// y = x W' + b + s ((drop(x_lora) A') * g) B' and its gradients on the CPU.
//
// The matrix products are ATen's (the vendor's GEMM); what is ours is one call in place of a dozen,
// beta=1 accumulation in both directions, and dropout on packed bits.
#include "lora_linear.h"

#include "dropout.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

bool has(const OptTensor& tensor) { return tensor.has_value() && tensor->defined(); }

Tensor gated(const Tensor& h, const OptTensor& gate) {
  return has(gate) ? h.mul(gate->to(h.scalar_type())) : h;
}

Tensor maybe_drop(const Tensor& x, const OptTensor& mask, double p) {
  return has(mask) && mask->numel() > 0 ? dropout_apply(x, *mask, p) : x;
}

Tensor grad_gate(const Tensor& u, const Tensor& h, const Tensor& gate) {
  const Tensor grad = u.mul(h);
  return (gate.dim() == 1 ? grad.sum(0) : grad).to(gate.scalar_type());
}

// The branch's part of dX: keep * (dh A) / (1 - p).
Tensor grad_branch(const Tensor& dh, const Tensor& a, const OptTensor& mask, double p) {
  Tensor grad = at::mm(dh, a);
  if (has(mask)) dropout_apply_(grad, *mask, p);
  return grad;
}

// dX = dY W + the branch's part, whichever of the two there is. The branch joins the larger product
// by accumulation: as a rank-r update of it, or with dropout as what it is added to.
Tensor grad_x(const Tensor& dy, const OptTensor& weight, const Tensor& dh, const Tensor& a,
              const OptTensor& mask, double p, bool separate) {
  if (!has(weight)) {
    return separate ? at::zeros({dy.size(0), a.size(1)}, dy.options())
                    : grad_branch(dh, a, mask, p);
  }
  if (!separate && has(mask)) return grad_branch(dh, a, mask, p).addmm_(dy, *weight);
  Tensor dx = at::mm(dy, *weight);
  return separate ? dx : dx.addmm_(dh, a);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const OptTensor& weight,
                                               const Tensor& lora_a, const Tensor& lora_b,
                                               const OptTensor& bias, const OptTensor& gate,
                                               const OptTensor& x_lora, const OptTensor& seed,
                                               double scaling, double dropout_p) {
  const auto dtype = x.scalar_type();
  Tensor branch = has(x_lora) ? *x_lora : x;
  Tensor mask;
  if (has(seed)) {
    mask = dropout_mask(*seed, x.size(0), x.size(1), dropout_p);
    branch = dropout_apply(branch, mask, dropout_p);
  } else {
    mask = at::empty({0}, x.options().dtype(at::kByte));
  }
  Tensor h = at::mm(branch, lora_a.to(dtype).t());
  const Tensor b_t = lora_b.to(dtype).t();
  Tensor y;
  if (has(weight)) {
    y = has(bias) ? at::addmm(*bias, x, weight->t()) : at::mm(x, weight->t());
    y.addmm_(gated(h, gate), b_t, 1, scaling);
  } else {
    y = at::mm(gated(h, gate), b_t).mul_(scaling);
    if (has(bias)) y.add_(*bias);
  }
  return {y, h, mask};
}

std::vector<Tensor> lora_linear_backward(const Tensor& dy, const OptTensor& x,
                                         const OptTensor& weight, const Tensor& lora_a,
                                         const Tensor& lora_b, const OptTensor& h,
                                         const OptTensor& gate, const OptTensor& mask,
                                         double scaling, double dropout_p, bool separate,
                                         std::array<bool, 5> needs) {
  const auto [needs_x, needs_a, needs_b, needs_gate, needs_x_lora] = needs;
  const auto dtype = dy.scalar_type();
  const Tensor u = at::mm(dy, lora_b.to(dtype)).mul_(scaling);
  const Tensor dh = gated(u, gate);
  const Tensor a = lora_a.to(dtype);
  std::vector<Tensor> grads;
  Tensor db;
  if (needs_b) {
    // h' dY and not dY' h: the GEMM reads dY along its rows.
    db = at::mm(gated(*h, gate).t(), dy).mul_(scaling).t().to(lora_b.scalar_type()).contiguous();
  }
  if (needs_x) grads.push_back(grad_x(dy, weight, dh, a, mask, dropout_p, separate));
  if (needs_a) {
    grads.push_back(at::mm(dh.t(), maybe_drop(*x, mask, dropout_p)).to(lora_a.scalar_type()));
  }
  if (needs_b) grads.push_back(db);
  if (needs_gate) grads.push_back(grad_gate(u, *h, *gate));
  if (needs_x_lora) grads.push_back(grad_branch(dh, a, mask, dropout_p));
  return grads;
}

}  // namespace lora_kernels
