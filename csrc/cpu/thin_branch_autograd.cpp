// A frozen linear with a branch of thin products, differentiated in C++: what ops/cored_rank.py and
// the columns of ops/folded_square.py do below a Function in Python, whose calls take longer than
// the products of a small layer. The branch is written first, and the base product is added to it,
// in y and in dX.
#include "thin_branch_autograd.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "autograd_rows.h"
#include "gate.h"
#include "products.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// y += x W' + b.
Tensor with_base(Tensor y, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  if (has(bias)) y.add_(*bias);
  if (has(weight)) accumulate_product(Way::kTorch, y, rows(x), weight->t());
  return with_lead_of(y, x);
}

// Gradients that refuse to be differentiated.
variable_list once(variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  for (Tensor& grad : grads) {
    if (grad.defined()) grad = grad.detach().set_requires_grad(true);
  }
  // Not on the heap: torch counts its nodes' references in one way to 2.11 and in another since.
  torch::autograd::DelayedError refuses(
      "trying to differentiate twice a linear whose branch is differentiable once", grads.size());
  return refuses.apply(std::move(grads));
}

struct CoredLinear : torch::autograd::Function<CoredLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight,
                        const OptTensor& bias, const Tensor& lora_a, const Tensor& core,
                        const Tensor& lora_b, double scaling) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor h = product(Way::kTorch, rows(x), lora_a.t());
    const Tensor turned = product(Way::kTorch, h, core.t());
    const Tensor base = x.requires_grad() ? weight.value_or(Tensor()) : Tensor();
    ctx->save_for_backward({core.requires_grad() ? h : Tensor(), base, lora_a, core, lora_b});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["needs_x"] = x.requires_grad();
    return with_base(product(Way::kTorch, turned, lora_b.t(), scaling), x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list grads(7);
    const variable_list saved = ctx->get_saved_variables();  // which a checkpoint makes anew
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      const Tensor &h = saved[0], &weight = saved[1], &lora_a = saved[2], &core = saved[3];
      const Tensor dy = rows(grad_outputs[0]);
      const double scaling = ctx->saved_data["scaling"].toDouble();
      const Tensor turned = product(Way::kTorch, dy, saved[4], scaling);
      if (h.defined()) grads[4] = product(Way::kTorch, turned.t(), h);
      if (ctx->saved_data["needs_x"].toBool()) {
        Tensor dx = product(Way::kTorch, product(Way::kTorch, turned, core), lora_a);
        if (weight.defined()) accumulate_product(Way::kTorch, dx, dy, weight);
        grads[0] = with_lead_of(dx, grad_outputs[0]);
      }
    }
    return once(std::move(grads));
  }
};

// [rows, width]: the sum of every width-th feature.
Tensor folded(const Tensor& x, int64_t width) {
  const int64_t whole = x.size(1) / width, rest = x.size(1) % width;
  Tensor sums = x.narrow(1, 0, whole * width).unflatten(1, {whole, width}).sum(1);
  if (rest > 0) sums.narrow(1, 0, rest).add_(x.narrow(1, whole * width, rest));
  return sums;
}

// Its transpose: each feature is its group's value.
Tensor spread(const Tensor& sums, int64_t features) {
  const int64_t width = sums.size(1), whole = features / width, rest = features % width;
  const Tensor x = at::empty({sums.size(0), features}, sums.options());
  x.narrow(1, 0, whole * width).unflatten(1, {whole, width}).copy_(sums.unsqueeze(1));
  if (rest > 0) x.narrow(1, whole * width, rest).copy_(sums.narrow(1, 0, rest));
  return x;
}

struct FoldedLinear : torch::autograd::Function<FoldedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight,
                        const OptTensor& bias, const Tensor& columns) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor sums = folded(rows(x), columns.size(0));
    const Tensor base = x.requires_grad() ? weight.value_or(Tensor()) : Tensor();
    ctx->save_for_backward({columns.requires_grad() ? sums : Tensor(), base, columns});
    ctx->saved_data["features"] = x.size(-1);
    ctx->saved_data["needs_x"] = x.requires_grad();
    return with_base(product(Way::kTorch, sums, columns), x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list grads(4);
    const variable_list saved = ctx->get_saved_variables();  // which a checkpoint makes anew
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      const Tensor &sums = saved[0], &weight = saved[1], &columns = saved[2];
      const Tensor dy = rows(grad_outputs[0]);
      if (sums.defined()) grads[3] = product(Way::kTorch, sums.t(), dy);
      if (ctx->saved_data["needs_x"].toBool()) {
        Tensor dx =
            spread(product(Way::kTorch, dy, columns.t()), ctx->saved_data["features"].toInt());
        if (weight.defined()) accumulate_product(Way::kTorch, dx, dy, weight);
        grads[0] = with_lead_of(dx, grad_outputs[0]);
      }
    }
    return once(std::move(grads));
  }
};

}  // namespace

Tensor cored_linear_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                             const Tensor& lora_a, const Tensor& core, const Tensor& lora_b,
                             double scaling) {
  return CoredLinear::apply(x, weight, bias, lora_a, core, lora_b, scaling);
}

Tensor folded_linear_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                              const Tensor& columns) {
  return FoldedLinear::apply(x, weight, bias, columns);
}

}  // namespace lora_kernels
