// The autograd of lora_linear in C++, for eager calls on the CPU: the Python Function of
// lora_kernels/ops/lora_linear.py costs more than the matmuls of a small layer. What is saved, and
// when, follows that file; the tests run one matrix over both.
#include "lora_linear_autograd.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd_rows.h"
#include "lora_linear.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Places of the differentiable arguments of apply().
enum Input { kX, kWeight, kA, kB, kBias, kGate, kXLora, kInputs };

Tensor plain(const OptTensor& tensor) { return tensor.value_or(Tensor()); }

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight_in,
                        const Tensor& lora_a, const Tensor& lora_b, const OptTensor& bias_in,
                        const OptTensor& gate_in, const OptTensor& x_lora_in, double scaling,
                        double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor weight = plain(weight_in), bias = plain(bias_in), gate = plain(gate_in),
                 x_lora = plain(x_lora_in);
    OptTensor seed;
    if (dropout_p > 0) seed = drawn_seed(x);
    const Tensor flat = rows(x);
    auto [y, h, mask] =
        lora_linear(flat, optional(weight), lora_a, lora_b, optional(bias),
                    optional(gate_rows(gate)), optional(rows(x_lora)), seed, scaling, dropout_p);
    save(ctx, {x, weight, lora_a, lora_b, bias, gate, x_lora}, h, mask, dropout_p);
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["separate"] = x_lora.defined();
    return with_lead_of(y, x);
  }

  // Of the inputs only what the gradients asked for will read.
  static void save(AutogradContext* ctx, variable_list in, const Tensor& h, const Tensor& mask,
                   double dropout_p) {
    const Needed needs(in, kInputs);
    ctx->saved_data["needed"] = needs.bits();
    const bool separate = in[kXLora].defined();
    const bool x_read = needs(kWeight) || (needs(kA) && !separate);
    const bool mask_read = dropout_p > 0 && (needs(kX) || needs(kA) || needs(kXLora));
    const bool h_read = needs(kB) || needs(kGate);
    if (!x_read) in[kX] = Tensor();
    if (!needs(kX) && !needs(kWeight)) in[kWeight] = Tensor();
    if (!needs(kA)) in[kXLora] = Tensor();
    in[kBias] = Tensor();
    in.push_back(h_read ? h : Tensor());
    in.push_back(mask_read ? mask : Tensor());
    ctx->save_for_backward(std::move(in));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& dy_any = grad_outputs[0];
    const Tensor dy = rows(dy_any);
    const Needed needs(ctx->saved_data["needed"].toInt());
    variable_list grads(kInputs + 2);
    if (at::GradMode::is_enabled()) {
      differentiable(ctx, saved, dy, needs, grads);
      return grads;
    }
    at::AutoDispatchBelowADInplaceOrView guard;  // no operation below has a derivative of its own
    const bool separate = ctx->saved_data["separate"].toBool();
    const std::array<bool, 5> asked = {needs(kX), needs(kA), needs(kB), needs(kGate),
                                       needs(kXLora)};
    const Tensor branch = rows(saved[separate ? kXLora : kX]);
    const auto given =
        lora_linear_backward(dy, optional(branch), optional(saved[kWeight]), saved[kA], saved[kB],
                             optional(saved[kInputs]), optional(gate_rows(saved[kGate])),
                             optional(saved[kInputs + 1]), ctx->saved_data["scaling"].toDouble(),
                             ctx->saved_data["dropout_p"].toDouble(), separate, asked);
    constexpr Input places[] = {kX, kA, kB, kGate, kXLora};
    for (size_t i = 0, next = 0; i < asked.size(); ++i) {
      if (asked[i]) grads[places[i]] = given[next++];
    }
    grads[kX] = with_lead_of(grads[kX], dy_any);
    grads[kXLora] = with_lead_of(grads[kXLora], dy_any);
    if (grads[kGate].defined()) grads[kGate] = grads[kGate].view(saved[kGate].sizes());
    if (needs(kWeight)) grads[kWeight] = at::mm(dy.t(), rows(saved[kX]));
    if (needs(kBias)) grads[kBias] = dy.sum(0);
    return grads;
  }

  static void differentiable(AutogradContext* ctx, const variable_list& saved, const Tensor& dy,
                             const Needed& needs, variable_list& grads) {
    const bool separate = ctx->saved_data["separate"].toBool();
    TORCH_CHECK(saved[kX].defined() && (!separate || saved[kXLora].defined()),
                "lora_linear: a double backward needs the input, which is not saved when no first "
                "derivative reads it (frozen lora_a, or an x_lora of its own)");
    const Tensor y =
        composite({saved[kX], saved[kWeight], saved[kA], saved[kB], saved[kGate], saved[kXLora],
                   saved[kInputs + 1], ctx->saved_data["scaling"].toDouble(),
                   ctx->saved_data["dropout_p"].toDouble()});
    put_differentiable_grads({y}, {dy}, saved, kInputs, needs, grads);
    if (needs(kBias)) grads[kBias] = dy.sum(0);
  }
};

}  // namespace

Tensor lora_linear_autograd(const Tensor& x, const OptTensor& weight, const Tensor& lora_a,
                            const Tensor& lora_b, const OptTensor& bias, const OptTensor& gate,
                            const OptTensor& x_lora, double scaling, double dropout_p) {
  return LoraLinear::apply(x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p);
}

}  // namespace lora_kernels
