// y = LoRA linear of z = act(gate) * up, for eager calls on the CPU: what
// lora_kernels/ops/lora_mlp.py has in Python. z is not kept but made again, and every gradient lies
// where what it is made of lay: new memory of the size of z costs about what a product of a small
// layer does.
#include "lora_glu_linear_autograd.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd_rows.h"
#include "lora_linear.h"
#include "ways.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Places of the differentiable arguments of apply(), and of what is saved beside them.
enum Input { kGate, kUp, kWeight, kA, kB, kBias, kInputs, kH = kBias, kMask };

c10::string_view approximation(const std::string& activation) {
  return activation == "gelu_tanh" ? "tanh" : "none";
}

Tensor activated(const Tensor& gate, const std::string& activation) {
  return activation == "silu" ? at::silu(gate) : at::gelu(gate, approximation(activation));
}

// d(act(gate)) to d(gate), in place.
void to_grad_of_gate(Tensor& grad, const Tensor& gate, const std::string& activation) {
  if (activation == "silu") {
    at::silu_backward_out(grad, grad, gate);
  } else {
    at::gelu_backward_out(grad, grad, gate, approximation(activation));
  }
}

struct LoraGluLinear : torch::autograd::Function<LoraGluLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up,
                        const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                        const OptTensor& bias, double scaling, double dropout_p,
                        const std::string& activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor product = activated(rows(gate).contiguous(), activation).mul_(rows(up));
    OptTensor seed;
    if (dropout_p > 0) seed = drawn_seed(gate);
    auto [y, h, mask] = lora_linear(product, weight, lora_a, lora_b, bias, std::nullopt,
                                    std::nullopt, seed, scaling, dropout_p);
    save(ctx, {gate, up, weight, lora_a, lora_b, bias.value_or(Tensor())}, h, mask, dropout_p);
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["activation"] = activation;
    return with_lead_of(y, gate);
  }

  // Of the inputs only what the gradients asked for will read.
  static void save(AutogradContext* ctx, variable_list in, const Tensor& h, const Tensor& mask,
                   double dropout_p) {
    const Needed needs(in, kInputs);
    ctx->saved_data["needed"] = needs.bits();
    const bool needs_product = needs(kGate) || needs(kUp);
    if (!needs_product && !needs(kWeight) && !needs(kA)) in[kGate] = in[kUp] = Tensor();
    if (!needs_product && !needs(kWeight)) in[kWeight] = Tensor();
    in[kH] = needs(kB) ? h : Tensor();
    in.push_back(dropout_p > 0 && (needs_product || needs(kA)) ? mask : Tensor());
    ctx->save_for_backward(std::move(in));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor dy = rows(grad_outputs[0]);
    const Needed needs(ctx->saved_data["needed"].toInt());
    variable_list grads(kInputs + 3);
    if (at::GradMode::is_enabled()) {
      differentiable(ctx, saved, dy, needs, grads);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;  // nothing below has a derivative of its own
      put_grads(ctx, saved, dy, needs, grads);
    }
    if (needs(kBias)) grads[kBias] = dy.sum(0);
    return grads;
  }

  static void put_grads(AutogradContext* ctx, const variable_list& saved, const Tensor& dy,
                        const Needed& needs, variable_list& grads) {
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const double p = ctx->saved_data["dropout_p"].toDouble();
    const bool needs_product = needs(kGate) || needs(kUp);
    const Way way = lora_linear_backward_way(dy, saved[kA], saved[kB], p > 0);
    const OptTensor mask = optional(saved[kMask]);
    const auto [dh, db] =
        from_output(way, dy, saved[kB], optional(saved[kH]), std::nullopt,
                    ctx->saved_data["scaling"].toDouble(), needs_product || needs(kA), needs(kB));
    if (needs(kB)) grads[kB] = db;
    Tensor dproduct;
    if (needs_product) {
      dproduct = lora_linear_grad_x(way, dy, saved[kWeight], dh, saved[kA], mask, p);
    }
    if (!saved[kGate].defined()) return;
    const Tensor gate = rows(saved[kGate]).contiguous(), up = rows(saved[kUp]);
    Tensor product = activated(gate, activation);
    if (needs(kUp)) grads[kUp] = product.mul(dproduct).view(saved[kUp].sizes());
    if (needs(kGate)) {
      to_grad_of_gate(dproduct.mul_(up), gate, activation);
      grads[kGate] = dproduct.view(saved[kGate].sizes());
    }
    if (!needs(kA) && !needs(kWeight)) return;
    product.mul_(up);
    if (needs(kA)) grads[kA] = grad_a(way, {product, mask, p}, dh, saved[kA]);
    if (needs(kWeight)) grads[kWeight] = at::mm(dy.t(), product);
  }

  // The gradients as differentiable functions of the inputs, for a second derivative.
  static void differentiable(AutogradContext* ctx, const variable_list& saved, const Tensor& dy,
                             const Needed& needs, variable_list& grads) {
    TORCH_CHECK(saved[kGate].defined(),
                "lora_mlp: a double backward needs the outputs of gate and up, which are not saved "
                "when no first derivative reads them (frozen but for down's lora_b)");
    const Tensor product =
        activated(rows(saved[kGate]), ctx->saved_data["activation"].toStringRef()) *
        rows(saved[kUp]);
    const Tensor y =
        composite({product, saved[kWeight], saved[kA], saved[kB], Tensor(), Tensor(), saved[kMask],
                   ctx->saved_data["scaling"].toDouble(), ctx->saved_data["dropout_p"].toDouble()});
    put_differentiable_grads({y}, {dy}, saved, kBias, needs, grads);
  }
};

}  // namespace

Tensor lora_glu_linear_autograd(const Tensor& gate, const Tensor& up, const Tensor& weight,
                                const Tensor& lora_a, const Tensor& lora_b, const OptTensor& bias,
                                double scaling, double dropout_p, const std::string& activation) {
  return LoraGluLinear::apply(gate, up, weight, lora_a, lora_b, bias, scaling, dropout_p,
                              activation);
}

}  // namespace lora_kernels
