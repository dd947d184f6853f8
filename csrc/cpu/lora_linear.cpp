// y = x W' + b + s ((drop(x_lora) A') * g) B' and its gradients on the CPU.
//
// The branch is one pass over each activation (branch.h) and joins the large product: in our own
// loops as r more columns of it (products.h), in the vendor's GEMM by accumulation or as an update.
#include "lora_linear.h"

#include "branch.h"
#include "dropout.h"
#include "gate.h"
#include "plain_branch.h"
#include "products.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

Way way_for(Op op, const Tensor& rows, const Tensor& lora_a, const Tensor& lora_b) {
  return way_of(op, rows.scalar_type(),
                {rows.size(0), lora_a.size(1) * lora_b.size(0), lora_a.size(0)});
}

// h = drop(x) A' [M, r] in the dtype of x.
Tensor shrunk(Way way, const Dropped& x, const Tensor& lora_a) {
  if (way == Way::kTorch) return plain_shrink(x, lora_a);
  const auto dtype = x.x.scalar_type();
  return unpack(shrink(x, pack_transposed(lora_a, dtype)), lora_a.size(0), dtype);
}

FromOutput packed_from_output(const Tensor& dy, const Tensor& lora_b, const OptTensor& h,
                              const OptTensor& gate, double scaling, bool needs_u, bool needs_b) {
  const auto dtype = dy.scalar_type();
  const Dropped whole = {dy, std::nullopt, 0.0};
  if (!needs_b) return {shrink(whole, pack(lora_b, dtype)).mul_(scaling), {}};
  const Tensor vectors = pack(gated(*h, gate), dtype);
  FromOutput from;
  if (needs_u) {
    std::tie(from.u, from.db) = shrink_outer(dy, pack(lora_b, dtype), vectors, scaling);
  } else {
    from.db = outer(whole, vectors, scaling);
  }
  from.db = unpack(from.db, lora_b.size(1), lora_b.scalar_type());
  return from;
}

FromOutput plain_from_output(const Tensor& dy, const Tensor& lora_b, const OptTensor& h,
                             const OptTensor& gate, double scaling, bool needs_u, bool needs_b) {
  FromOutput from;
  if (needs_u) {
    from.u = product(Way::kTorch, dy, lora_b.to(dy.scalar_type()), scaling);
  }
  if (needs_b) from.db = plain_grad_b(dy, gated(*h, gate), lora_b, scaling);
  return from;
}

// U * g as wide as U.
Tensor gated_rows(const Tensor& u, const OptTensor& gate, int64_t rank, at::ScalarType dtype) {
  if (!has(gate)) return u;
  const Tensor dh = u.narrow(1, 0, rank).mul(gate->to(u.scalar_type()));
  return u.size(1) == rank ? dh : pack(dh, dtype);
}

// y = x W' + b + s V B'.
Tensor output(Way way, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
              const Tensor& vectors, const Tensor& b_t, double scaling) {
  if (has(weight)) return branched_product(way, x, weight->t(), bias, vectors, b_t, scaling);
  Tensor y = product(way, vectors, b_t, scaling);
  return has(bias) ? y.add_(*bias) : y;
}

}  // namespace

Way lora_linear_backward_way(const Tensor& dy, const Tensor& lora_a, const Tensor& lora_b,
                             bool drops) {
  const Op op = drops ? Op::kLinearDroppedBackward : Op::kLinearBackward;
  return way_for(op, dy, lora_a, lora_b);
}

FromOutput from_output(Way way, const Tensor& dy, const Tensor& lora_b, const OptTensor& h,
                       const OptTensor& gate, double scaling, bool needs_u, bool needs_b) {
  if (!needs_u && !needs_b) return {};
  const auto& read = way == Way::kTorch ? plain_from_output : packed_from_output;
  return read(dy, lora_b, h, gate, scaling, needs_u, needs_b);
}

Tensor grad_a(Way way, const Dropped& x, const Tensor& dh, const Tensor& lora_a) {
  if (way == Way::kTorch) return plain_grad_a(x, dh, lora_a);
  const Tensor packed = outer(x, pack(dh, x.x.scalar_type()), 1.0);
  return unpack_transposed(packed, lora_a.size(0), lora_a.scalar_type());
}

// With dropout the branch comes first, for its mask.
Tensor lora_linear_grad_x(Way way, const Tensor& dy, const OptTensor& weight, const Tensor& dh,
                          const Tensor& lora_a, const OptTensor& mask, double p) {
  const auto dtype = dy.scalar_type();
  if (has(mask)) {
    const auto& expanded = way == Way::kTorch ? plain_expand_dropped : expand_dropped;
    Tensor dx = expanded(dh, lora_a, *mask, p, dtype);
    if (has(weight)) accumulate_product(way, dx, dy, *weight);
    return dx;
  }
  if (has(weight)) return branched_product(way, dy, *weight, std::nullopt, dh, lora_a, 1.0);
  return product(way, unpack(dh, lora_a.size(0), dtype), lora_a.to(dtype));
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
  const Way way = way_for(has(seed) ? Op::kLinearDropped : Op::kLinear, x, lora_a, lora_b);
  const Tensor h = shrunk(way, branch, lora_a);
  const Tensor y = output(way, x, weight, bias, gated(h, gate), lora_b.to(dtype).t(), scaling);
  return {y, h, mask};
}

std::vector<Tensor> lora_linear_backward(const Tensor& dy, const OptTensor& x,
                                         const OptTensor& weight, const Tensor& lora_a,
                                         const Tensor& lora_b, const OptTensor& h,
                                         const OptTensor& gate, const OptTensor& mask,
                                         double scaling, double dropout_p, bool separate,
                                         std::array<bool, 5> needs) {
  const Way way = lora_linear_backward_way(dy, lora_a, lora_b, has(mask));
  const auto [needs_x, needs_a, needs_b, needs_gate, needs_x_lora] = needs;
  const bool needs_dh = needs_a || needs_gate || needs_x_lora || (needs_x && !separate);
  const auto dtype = dy.scalar_type();
  const auto [u, db] = from_output(way, dy, lora_b, h, gate, scaling, needs_dh, needs_b);
  const int64_t rank = lora_a.size(0);
  const Tensor dh = needs_dh ? gated_rows(u, gate, rank, dtype) : Tensor();
  std::vector<Tensor> grads;
  if (needs_x && separate) {
    grads.push_back(has(weight) ? product(way, dy, *weight)
                                : at::zeros({dy.size(0), lora_a.size(1)}, dy.options()));
  } else if (needs_x) {
    grads.push_back(lora_linear_grad_x(way, dy, weight, dh, lora_a, mask, dropout_p));
  }
  if (needs_a) grads.push_back(grad_a(way, {*x, mask, dropout_p}, dh, lora_a));
  if (needs_b) grads.push_back(db);
  if (needs_gate) grads.push_back(grad_gate(u.narrow(1, 0, rank), *h, *gate));
  if (needs_x_lora)
    grads.push_back(lora_linear_grad_x(way, dy, std::nullopt, dh, lora_a, mask, dropout_p));
  return grads;
}

}  // namespace lora_kernels
