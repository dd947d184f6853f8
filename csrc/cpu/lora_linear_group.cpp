// y_i = x W_i' + b_i + s_i ((drop_i(x) A_i') * g_i) B_i' and the gradients on the CPU.
//
// Without dropout the factors are stacked: one pass over x gives every h, one gives every dA, and
// one adds every branch to dX. With dropout each member has a mask, and so a pass, of its own. dX
// is accumulated by the products that make it. In our own loops (products.h) the branches without
// masks join those products, and x is packed once for all of them.
#include "lora_linear_group.h"

#include <algorithm>

#include "branch.h"
#include "dropout.h"
#include "gate.h"
#include "products.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

OptTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptTensor(tensor) : std::nullopt;
}

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

// Every h, packed: columns of one tensor where nothing drops.
std::vector<Tensor> shrink_all(const Tensor& x, at::TensorList lora_as,
                               const std::vector<Tensor>& masks, at::ArrayRef<double> ps) {
  const auto dtype = x.scalar_type();
  std::vector<Tensor> hs;
  if (!any_drops(ps)) {
    const Tensor h = shrink({x, std::nullopt, 0.0}, pack_transposed(stacked(lora_as), dtype));
    int64_t begin = 0;
    for (const Tensor& a : lora_as) {
      hs.push_back(h.narrow(1, begin, a.size(0)));
      begin += a.size(0);
    }
    return hs;
  }
  for (size_t i = 0; i < lora_as.size(); ++i) {
    const Tensor h = shrink({x, optional(masks[i]), ps[i]}, pack_transposed(lora_as[i], dtype));
    hs.push_back(h.narrow(1, 0, lora_as[i].size(0)));
  }
  return hs;
}

// Whether the sums are of the dtype that is stored: then a rank-r update is a pass of our own.
bool is_math(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

// x W' + b, or b alone where W is quantised and added by another op.
Tensor base_output(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t out) {
  if (!weight.defined()) {
    Tensor y = at::zeros({x.size(0), out}, x.options());
    return bias.defined() ? y.copy_(bias) : y;
  }
  return bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
}

// y_i = x W_i' + b_i + s_i V_i B_i' for the gated h of each member.
std::vector<Tensor> outputs(const Tensor& x, const OptTensors& weights, const OptTensors& biases,
                            const std::vector<Tensor>& vectors, at::TensorList lora_bs,
                            at::ArrayRef<double> scalings) {
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor weight = item(weights, i), bias = item(biases, i), b_t = lora_bs[i].t();
    if (weight.defined() && !is_math(x.scalar_type())) {
      ys.push_back(branched_product(Way::kVendor, x, weight.t(), optional(bias), vectors[i], b_t,
                                    scalings[i]));
      continue;
    }
    Tensor y = base_output(x, weight, bias, lora_bs[i].size(0));
    if (is_math(y.scalar_type())) {
      expand_into(y, vectors[i], b_t, std::nullopt, scalings[i], true);
    } else {
      y.add_(product(Way::kVendor, vectors[i].to(y.scalar_type()), b_t.to(y.scalar_type())),
             scalings[i]);
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

// By the largest member; without a quantised one, as those are added by another op.
Way way_for(Op op, const Tensor& rows, const OptTensors& weights, at::TensorList lora_as) {
  if (!all_dense(weights)) return Way::kVendor;
  Shape shape = {rows.size(0), 0, 0};
  for (size_t i = 0; i < lora_as.size(); ++i) {
    shape.weight = std::max(shape.weight, item(weights, i).numel());
    shape.rank = std::max(shape.rank, lora_as[i].size(0));
  }
  return way_of(op, rows.scalar_type(), shape);
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
  const std::vector<Tensor> hs = shrink_all(x, lora_as, masks, dropout_ps);
  for (size_t i = 0; i < size; ++i) {
    vectors.push_back(gated(hs[i], gates.get(i)));
    kept.push_back(hs[i].to(x.scalar_type(), false, true, at::MemoryFormat::Contiguous));
  }
  const bool panels = way_for(Op::kGroup, x, weights, lora_as) == Way::kPanels;
  const auto& multiplied = panels ? outputs_in_panels : outputs;
  std::vector<Tensor> ys = multiplied(x, weights, biases, vectors, lora_bs, scalings);
  ys.insert(ys.end(), kept.begin(), kept.end());
  ys.insert(ys.end(), bits.begin(), bits.end());
  return ys;
}

namespace {

// What one dY gives by way of B: dH in the dtype of sums, dB and dg.
struct FromOutput {
  Tensor dh, db, dgate;
};

FromOutput from_output(const Tensor& dy, const Tensor& lora_b, const Tensor& h,
                       const OptTensor& gate, double scaling, bool need_b, bool need_gate) {
  const auto dtype = dy.scalar_type();
  const int64_t rank = lora_b.size(1);
  FromOutput from;
  Tensor u;
  if (need_b) {
    std::tie(u, from.db) =
        shrink_outer(dy, pack(lora_b, dtype), pack(gated(h, gate), dtype), scaling);
    from.db = unpack(from.db, rank, lora_b.scalar_type());
  } else {
    u = shrink({dy, std::nullopt, 0.0}, pack(lora_b, dtype)).mul_(scaling);
  }
  u = u.narrow(1, 0, rank);
  if (need_gate) from.dgate = grad_gate(u, h, *gate);
  from.dh = gated(u, gate);
  return from;
}

// dx = the branches' parts of dX, or with `add` dx += them.
void put_branches(const Tensor& dx, at::TensorList lora_as, const std::vector<Tensor>& dhs,
                  const OptTensors& masks, at::ArrayRef<double> ps, bool add) {
  const auto math = dhs[0].scalar_type();
  if (!any_drops(ps)) {
    expand_into(dx, at::cat(dhs, 1), stacked(lora_as).to(math), std::nullopt, 1.0, add);
    return;
  }
  for (size_t i = 0; i < dhs.size(); ++i) {
    expand_into(dx, dhs[i], lora_as[i].to(math), masks.get(i), 1.0 / (1.0 - ps[i]), add || i > 0);
  }
}

// dX in our loops, the branches among the products or, under their masks, before them.
Tensor grad_x_in_panels(at::TensorList dys, const OptTensors& weights, at::TensorList lora_as,
                        const std::vector<Tensor>& dhs, const OptTensors& masks,
                        at::ArrayRef<double> ps) {
  std::vector<Tensor> lefts = dys.vec();
  std::vector<Product> products;
  for (size_t i = 0; i < dys.size(); ++i) products.push_back({i, item(weights, i)});
  const bool drops = any_drops(ps);
  Tensor dx = at::empty({dys[0].size(0), lora_as[0].size(1)}, dys[0].options());
  if (drops) {
    put_branches(dx, lora_as, dhs, masks, ps, false);
  } else {
    lefts.push_back(at::cat(dhs, 1));
    products.push_back({dys.size(), stacked(lora_as).to(at::kFloat)});
  }
  sum_products(lefts, {{dx, std::nullopt, products, drops}});
  return dx;
}

// dX = sum of dY_i W_i, over the weights that are there, and of the branches' parts, which come
// first where each sum is rounded.
Tensor grad_x(at::TensorList dys, const OptTensors& weights, at::TensorList lora_as,
              const std::vector<Tensor>& dhs, const OptTensors& masks, at::ArrayRef<double> ps) {
  if (way_for(Op::kGroupBackward, dys[0], weights, lora_as) == Way::kPanels) {
    return grad_x_in_panels(dys, weights, lora_as, dhs, masks, ps);
  }
  const bool exact = is_math(dys[0].scalar_type());
  Tensor dx;
  if (!exact) {
    dx = at::empty({dys[0].size(0), lora_as[0].size(1)}, dhs[0].options());
    put_branches(dx, lora_as, dhs, masks, ps, false);
    dx = dx.to(dys[0].scalar_type());
  }
  for (size_t i = 0; i < dys.size(); ++i) {
    const Tensor weight = item(weights, i);
    if (!weight.defined()) continue;
    if (dx.defined()) {
      accumulate_product(Way::kVendor, dx, dys[i], weight);
    } else {
      dx = product(Way::kVendor, dys[i], weight);
    }
  }
  if (!dx.defined()) dx = at::zeros({dys[0].size(0), lora_as[0].size(1)}, dys[0].options());
  if (exact) put_branches(dx, lora_as, dhs, masks, ps, true);
  return dx;
}

// dA of each member.
std::vector<Tensor> grad_as(const Tensor& x, at::TensorList lora_as, const std::vector<Tensor>& dhs,
                            const OptTensors& masks, at::ArrayRef<double> ps) {
  std::vector<Tensor> das;
  const Tensor all =
      any_drops(ps) ? Tensor()
                    : outer({x, std::nullopt, 0.0}, pack(at::cat(dhs, 1), x.scalar_type()), 1.0);
  int64_t begin = 0;
  for (size_t i = 0; i < lora_as.size(); ++i) {
    const int64_t rank = lora_as[i].size(0);
    if (all.defined()) {
      das.push_back(unpack_transposed(all.narrow(1, begin, rank), rank, lora_as[i].scalar_type()));
      begin += rank;
    } else {
      const Tensor da = outer({x, masks.get(i), ps[i]}, pack(dhs[i], x.scalar_type()), 1.0);
      das.push_back(unpack_transposed(da, rank, lora_as[i].scalar_type()));
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
  std::vector<FromOutput> from;
  std::vector<Tensor> dhs;
  bool needs_a = false;
  for (size_t i = 0; i < size; ++i) {
    needs_a = needs_a || needs.get(3 * i + 1);
    from.push_back(from_output(dys[i], lora_bs[i], item(hs, i), gates.get(i), scalings[i],
                               needs.get(3 * i + 2), needs.get(3 * i + 3)));
    dhs.push_back(from.back().dh);
  }
  std::vector<Tensor> grads, das(size);
  if (needs.get(0)) grads.push_back(grad_x(dys, weights, lora_as, dhs, masks, dropout_ps));
  if (needs_a) das = grad_as(*x, lora_as, dhs, masks, dropout_ps);
  for (size_t i = 0; i < size; ++i) {
    if (needs.get(3 * i + 1)) grads.push_back(das[i]);
    if (needs.get(3 * i + 2)) grads.push_back(from[i].db);
    if (needs.get(3 * i + 3)) grads.push_back(from[i].dgate);
  }
  return grads;
}

}  // namespace lora_kernels
