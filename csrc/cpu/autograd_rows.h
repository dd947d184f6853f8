// What the autograd nodes in C++ share: any leading dimensions as rows, which inputs need a
// gradient, and the equation once more, for a second derivative.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "dropout.h"
#include "tensors.h"

namespace lora_kernels {

inline at::Tensor rows(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

// A gate on the rank is one vector for all rows, or has x's leading dimensions.
inline at::Tensor gate_rows(const at::Tensor& gate) {
  return gate.defined() && gate.dim() == 1 ? gate : rows(gate);
}

// Rows with the leading dimensions of `like`.
inline at::Tensor with_lead_of(const at::Tensor& matrix, const at::Tensor& like) {
  if (!matrix.defined() || like.dim() == 2) return matrix;
  auto shape = like.sizes().vec();
  shape.back() = matrix.size(-1);
  return matrix.view(shape);
}

inline at::Tensor drawn_seed(const at::Tensor& like) {
  return at::empty({1}, like.options().dtype(at::kLong)).random_();
}

// Which inputs need a gradient, a bit each: autograd's own answer counts only those that are there.
class Needed {
 public:
  explicit Needed(int64_t bits) : bits_(bits) {}

  // Of the first `count` of some inputs.
  Needed(const torch::autograd::variable_list& inputs, int count) {
    for (int i = 0; i < count; ++i) {
      bits_ |= static_cast<int64_t>(inputs[i].defined() && inputs[i].requires_grad()) << i;
    }
  }

  bool operator()(int64_t i) const { return (bits_ >> i & 1) != 0; }
  int64_t bits() const { return bits_; }

 private:
  int64_t bits_ = 0;
};

// A linear with a branch; what it has not is undefined.
struct Branched {
  at::Tensor x, weight, lora_a, lora_b, gate, x_lora, mask;
  double scaling, p;
};

// The equation in differentiable operations, for a second derivative.
inline at::Tensor composite(const Branched& of) {
  const at::Tensor x = rows(of.x), gate = gate_rows(of.gate);
  at::Tensor branch = of.x_lora.defined() ? rows(of.x_lora) : x;
  if (of.mask.defined()) branch = branch * dropout_scale(branch, of.mask, of.p);
  at::Tensor h = at::mm(branch, of.lora_a.to(x.scalar_type()).t());
  if (gate.defined()) h = h * gate.to(x.scalar_type());
  const at::Tensor delta = at::mm(h, of.lora_b.to(x.scalar_type()).t()) * of.scaling;
  return of.weight.defined() ? at::mm(x, of.weight.t()) + delta : delta;
}

// grads[i] = d(ys)/d(inputs[i]) . dys as something to differentiate again, for the first `count`
// inputs, where needs(i) and the input was saved.
template <typename Needs>
void put_differentiable_grads(const torch::autograd::variable_list& ys,
                              const torch::autograd::variable_list& dys,
                              const torch::autograd::variable_list& inputs, size_t count,
                              const Needs& needs, torch::autograd::variable_list& grads) {
  torch::autograd::variable_list wanted;
  std::vector<size_t> places;
  for (size_t i = 0; i < count; ++i) {
    if (!needs(i) || !inputs[i].defined()) continue;
    wanted.push_back(inputs[i]);
    places.push_back(i);
  }
  if (wanted.empty()) return;
  const auto given = torch::autograd::grad(ys, wanted, dys, true, true, true);
  for (size_t i = 0; i < places.size(); ++i) grads[places[i]] = given[i];
}

}  // namespace lora_kernels
