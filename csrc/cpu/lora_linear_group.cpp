// y_i = x W_i' + b_i + s_i ((drop_i(x) A_i') * g_i) B_i' and the gradients on the CPU.
//
// Without dropout the factors are stacked: one pass over x, or one product, gives every h, one
// every dA and one every branch's part of dX. With dropout each member has a mask, and so a pass,
// of its own. dX is accumulated by the products that make it. In our own loops (products.h) the
// branches without masks join those products, and x is packed once for all of them.
#include "lora_linear_group.h"

#include <algorithm>

#include "branch.h"
#include "dropout.h"
#include "gate.h"
#include "lora_linear.h"
#include "math_type.h"
#include "plain_branch.h"
#include "products.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

// A tensor that is there, of an optional list.
Tensor item(const OptTensors& list, size_t i) {
  const OptTensor tensor = list.get(i);
  return tensor.value_or(Tensor());
}

bool any_drops(at::ArrayRef<double> ps) {
  return std::any_of(ps.begin(), ps.end(), [](double p) { return p > 0; });
}

Tensor stacked(at::TensorList lora_as) {
  return lora_as.size() == 1 ? lora_as[0] : at::cat(lora_as);
}

// Whether one pass, of our own loops, serves all members.
bool in_one_pass(Way way, at::ArrayRef<double> ps) { return way != Way::kTorch && !any_drops(ps); }

// Every h: columns of one tensor where one pass gives them.
std::vector<Tensor> shrink_all(Way way, const Tensor& x, at::TensorList lora_as,
                               const std::vector<Tensor>& masks, at::ArrayRef<double> ps) {
  const auto dtype = x.scalar_type();
  std::vector<Tensor> hs;
  Tensor all;
  if (in_one_pass(way, ps)) {
    all = shrink({x, std::nullopt, 0.0}, pack_transposed(stacked(lora_as), dtype));
  }
  int64_t begin = 0;
  for (size_t i = 0; i < lora_as.size(); ++i) {
    const Dropped branch = {x, optional(masks[i]), ps[i]};
    const int64_t rank = lora_as[i].size(0);
    if (all.defined()) {
      hs.push_back(all.narrow(1, begin, rank));
      begin += rank;
    } else if (way == Way::kTorch) {
      hs.push_back(plain_shrink(branch, lora_as[i]));
    } else {
      hs.push_back(shrink(branch, pack_transposed(lora_as[i], dtype)).narrow(1, 0, rank));
    }
  }
  return hs;
}

// b alone, or zeros: where W is quantised and added by another op.
Tensor without_base(const Tensor& x, const Tensor& bias, int64_t out) {
  Tensor y = at::zeros({x.size(0), out}, x.options());
  return bias.defined() ? y.copy_(bias) : y;
}

// y_i = x W_i' + b_i + s_i V_i B_i' for the gated h of each member.
std::vector<Tensor> outputs(Way way, const Tensor& x, const OptTensors& weights,
                            const OptTensors& biases, const std::vector<Tensor>& vectors,
                            at::TensorList lora_bs, at::ArrayRef<double> scalings) {
  const auto dtype = x.scalar_type();
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor weight = item(weights, i), bias = item(biases, i), b_t = lora_bs[i].t();
    if (weight.defined()) {
      ys.push_back(branched_product(way, x, weight.t(), optional(bias), vectors[i], b_t.to(dtype),
                                    scalings[i]));
      continue;
    }
    Tensor y = without_base(x, bias, lora_bs[i].size(0));
    if (dtype == math_of(dtype)) {
      expand_into(y, vectors[i], b_t, std::nullopt, scalings[i], true);
    } else {
      y.add_(product(way, vectors[i].to(dtype), b_t.to(dtype)), scalings[i]);
    }
    ys.push_back(y);
  }
  return ys;
}

std::vector<Tensor> outputs_in_panels(const Tensor& x, const OptTensors& weights,
                                      const OptTensors& biases, const std::vector<Tensor>& vectors,
                                      at::TensorList lora_bs, at::ArrayRef<double> scalings) {
  std::vector<Tensor> ys, lefts = {x};
  std::vector<ProductSum> sums;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(at::empty({x.size(0), lora_bs[i].size(0)}, x.options()));
    lefts.push_back(vectors[i].mul(scalings[i]));
    const Tensor b_t = lora_bs[i].to(at::kFloat).t();
    sums.push_back({ys[i], optional(item(biases, i)), {{0, item(weights, i).t()}, {i + 1, b_t}}});
  }
  sum_products(lefts, sums);
  return ys;
}

bool all_dense(const OptTensors& weights) {
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!item(weights, i).defined()) return false;
  }
  return true;
}

// By the largest member. A weight that is not there is added by another op, or read by nothing.
Way way_for(Op op, const Tensor& rows, const OptTensors& weights, at::TensorList lora_as,
            at::TensorList lora_bs) {
  Shape shape = {rows.size(0), 0, 0};
  for (size_t i = 0; i < lora_as.size(); ++i) {
    shape.weight = std::max(shape.weight, lora_as[i].size(1) * lora_bs[i].size(0));
    shape.rank = std::max(shape.rank, lora_as[i].size(0));
  }
  const Way way = way_of(op, rows.scalar_type(), shape);
  return way == Way::kPanels && !all_dense(weights) ? Way::kVendor : way;
}

}  // namespace

std::vector<Tensor> lora_linear_group(const Tensor& x, const OptTensors& weights,
                                      at::TensorList lora_as, at::TensorList lora_bs,
                                      const OptTensors& biases, const OptTensors& gates,
                                      const OptTensor& seeds, at::ArrayRef<double> scalings,
                                      at::ArrayRef<double> dropout_ps) {
  const size_t size = weights.size();
  std::vector<Tensor> masks(size), vectors, kept, bits;
  for (size_t i = 0, drawn = 0; i < size; ++i) {
    if (dropout_ps[i] <= 0) continue;
    const Tensor seed = seeds->narrow(0, static_cast<int64_t>(drawn++), 1);
    masks[i] = dropout_mask(seed, x.size(0), x.size(1), dropout_ps[i]);
    bits.push_back(masks[i]);
  }
  const Op op = any_drops(dropout_ps) ? Op::kGroupDropped : Op::kGroup;
  const Way way = way_for(op, x, weights, lora_as, lora_bs);
  const std::vector<Tensor> hs = shrink_all(way, x, lora_as, masks, dropout_ps);
  for (size_t i = 0; i < size; ++i) {
    vectors.push_back(gated(hs[i], gates.get(i)));
    const bool own = way == Way::kTorch;  // and no columns of another tensor
    kept.push_back(own ? hs[i] : hs[i].to(x.scalar_type(), false, true, kContiguous));
  }
  std::vector<Tensor> ys = way == Way::kPanels
                               ? outputs_in_panels(x, weights, biases, vectors, lora_bs, scalings)
                               : outputs(way, x, weights, biases, vectors, lora_bs, scalings);
  ys.insert(ys.end(), kept.begin(), kept.end());
  ys.insert(ys.end(), bits.begin(), bits.end());
  return ys;
}

namespace {

// The branches' part of dX, in what it is summed in.
Tensor packed_branches(at::TensorList lora_as, const std::vector<Tensor>& dhs,
                       const OptTensors& masks, at::ArrayRef<double> ps) {
  const auto math = dhs[0].scalar_type();
  Tensor dx = at::empty({dhs[0].size(0), lora_as[0].size(1)}, dhs[0].options());
  if (!any_drops(ps)) {
    expand_into(dx, at::cat(dhs, 1), stacked(lora_as).to(math), std::nullopt, 1.0, false);
    return dx;
  }
  for (size_t i = 0; i < dhs.size(); ++i) {
    expand_into(dx, dhs[i], lora_as[i].to(math), masks.get(i), 1.0 / (1.0 - ps[i]), i > 0);
  }
  return dx;
}

// dX in our loops, the branches among the products or, under their masks, before them.
Tensor grad_x_in_panels(at::TensorList dys, const OptTensors& weights, at::TensorList lora_as,
                        const std::vector<Tensor>& dhs, const OptTensors& masks,
                        at::ArrayRef<double> ps) {
  std::vector<Tensor> lefts = dys.vec();
  std::vector<Product> products;
  for (size_t i = 0; i < dys.size(); ++i) products.push_back({i, item(weights, i)});
  const bool drops = any_drops(ps);
  Tensor dx;
  if (drops) {
    dx = packed_branches(lora_as, dhs, masks, ps);
  } else {
    dx = at::empty({dys[0].size(0), lora_as[0].size(1)}, dys[0].options());
    lefts.push_back(at::cat(dhs, 1));
    products.push_back({dys.size(), stacked(lora_as).to(at::kFloat)});
  }
  sum_products(lefts, {{dx, std::nullopt, products, drops}});
  return dx;
}

// dX as the sum of what a lone linear's is, in one tensor. A branch under a mask is summed apart.
Tensor plain_grad_x(at::TensorList dys, const OptTensors& weights, at::TensorList lora_as,
                    const std::vector<Tensor>& dhs, const OptTensors& masks,
                    at::ArrayRef<double> ps) {
  const auto dtype = dys[0].scalar_type();
  Tensor dx;
  const auto add = [&](const Tensor& left, const Tensor& right) {
    if (dx.defined()) {
      accumulate_product(Way::kTorch, dx, left, right);
    } else {
      dx = product(Way::kTorch, left, right);
    }
  };
  for (size_t i = 0; i < dys.size(); ++i) {
    const Tensor weight = item(weights, i);
    const OptTensor mask = masks.get(i);
    if (has(mask)) {
      const Tensor part = plain_expand_dropped(dhs[i], lora_as[i], *mask, ps[i], dtype);
      dx = dx.defined() ? dx.add_(part) : part;
    } else {
      add(dhs[i].to(dtype), lora_as[i].to(dtype));
    }
    if (weight.defined()) add(dys[i], weight);
  }
  return dx;
}

// dX = the branches' parts and the sum of dY_i W_i, over the weights that are there: the branches
// first, as a product then costs no more than to write it.
Tensor grad_x(Way way, at::TensorList dys, const OptTensors& weights, at::TensorList lora_as,
              const std::vector<Tensor>& dhs, const OptTensors& masks, at::ArrayRef<double> ps) {
  if (way == Way::kTorch) return plain_grad_x(dys, weights, lora_as, dhs, masks, ps);
  if (way == Way::kPanels) return grad_x_in_panels(dys, weights, lora_as, dhs, masks, ps);
  const Tensor dx = packed_branches(lora_as, dhs, masks, ps).to(dys[0].scalar_type());
  for (size_t i = 0; i < dys.size(); ++i) {
    const Tensor weight = item(weights, i);
    if (weight.defined()) accumulate_product(way, dx, dys[i], weight);
  }
  return dx;
}

// dA of each member.
std::vector<Tensor> grad_as(Way way, const Tensor& x, at::TensorList lora_as,
                            const std::vector<Tensor>& dhs, const OptTensors& masks,
                            at::ArrayRef<double> ps) {
  std::vector<Tensor> das;
  Tensor all;
  if (in_one_pass(way, ps)) {
    all = outer({x, std::nullopt, 0.0}, pack(at::cat(dhs, 1), x.scalar_type()), 1.0);
  }
  int64_t begin = 0;
  for (size_t i = 0; i < lora_as.size(); ++i) {
    if (all.defined()) {
      const int64_t rank = lora_as[i].size(0);
      das.push_back(unpack_transposed(all.narrow(1, begin, rank), rank, lora_as[i].scalar_type()));
      begin += rank;
    } else {
      das.push_back(grad_a(way, {x, masks.get(i), ps[i]}, dhs[i], lora_as[i]));
    }
  }
  return das;
}

}  // namespace

std::vector<Tensor> lora_linear_group_backward(
    at::TensorList dys, const OptTensor& x, const OptTensors& weights, at::TensorList lora_as,
    at::TensorList lora_bs, const OptTensors& hs, const OptTensors& gates, const OptTensors& masks,
    at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_ps, const c10::List<bool>& needs) {
  const size_t size = dys.size();
  const Op op = any_drops(dropout_ps) ? Op::kGroupDroppedBackward : Op::kGroupBackward;
  const Way way = way_for(op, dys[0], weights, lora_as, lora_bs);
  bool needs_a = false;
  for (size_t i = 0; i < size; ++i) needs_a = needs_a || needs.get(3 * i + 1);
  std::vector<Tensor> dhs, dbs(size), dgates(size), das(size), grads;
  for (size_t i = 0; i < size; ++i) {
    const bool needs_gate = needs.get(3 * i + 3);
    const OptTensor h = hs.get(i), gate = gates.get(i);
    const auto [u, db] = from_output(way, dys[i], lora_bs[i], h, gate, scalings[i],
                                     needs.get(0) || needs_a || needs_gate, needs.get(3 * i + 2));
    dbs[i] = db;
    if (!u.defined()) continue;
    const Tensor own = u.narrow(1, 0, lora_bs[i].size(1));
    if (needs_gate) dgates[i] = grad_gate(own, *h, *gate);
    dhs.push_back(gated(own, gate));
  }
  if (needs.get(0)) grads.push_back(grad_x(way, dys, weights, lora_as, dhs, masks, dropout_ps));
  if (needs_a) das = grad_as(way, *x, lora_as, dhs, masks, dropout_ps);
  for (size_t i = 0; i < size; ++i) {
    if (needs.get(3 * i + 1)) grads.push_back(das[i]);
    if (needs.get(3 * i + 2)) grads.push_back(dbs[i]);
    if (needs.get(3 * i + 3)) grads.push_back(dgates[i]);
  }
  return grads;
}

}  // namespace lora_kernels
