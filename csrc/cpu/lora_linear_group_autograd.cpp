// The autograd of lora_linear_group in C++, for eager calls on the CPU with dense weights. What is
// saved, and when, follows lora_kernels/ops/lora_linear_group.py; the tests run one matrix over
// both.
#include "lora_linear_group_autograd.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "autograd_rows.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The tensors of member i are at kind * members + i; of those that are saved, h and the mask last.
enum Kind { kWeight, kA, kB, kBias, kGate, kKinds, kH = kKinds, kMask, kSaved };

// What is no tensor, and where the tensors that are given belong.
struct Given {
  std::vector<int64_t> places;
  std::vector<double> scalings, ps;
};

Tensor drawn_seeds(const Tensor& x, const std::vector<double>& ps) {
  variable_list seeds;
  for (double p : ps) {
    if (p > 0) seeds.push_back(drawn_seed(x));
  }
  return seeds.empty() ? Tensor() : at::cat(seeds);
}

OptTensors optionals(const variable_list& tensors, const std::vector<int64_t>& places) {
  OptTensors list;
  for (int64_t place : places) list.push_back(optional(tensors[place]));
  return list;
}

variable_list chosen(const variable_list& tensors, const std::vector<int64_t>& places) {
  variable_list list;
  for (int64_t place : places) list.push_back(tensors[place]);
  return list;
}

template <typename T>
std::vector<T> chosen(const std::vector<T>& numbers, const std::vector<int64_t>& places) {
  std::vector<T> list;
  for (int64_t place : places) list.push_back(numbers[place]);
  return list;
}

// What a backward pass works with: the members whose output is used, and what of theirs is asked.
struct Backward {
  variable_list saved, dys;
  std::vector<int64_t> used;
  std::vector<double> scalings, ps;
  std::vector<bool> needed;  // of x, and of each place of the first kKinds kinds
  int64_t members;

  Backward(AutogradContext* ctx, const variable_list& grad_outputs)
      : saved(ctx->get_saved_variables()),
        scalings(ctx->saved_data["scalings"].toDoubleVector()),
        ps(ctx->saved_data["ps"].toDoubleVector()),
        members(static_cast<int64_t>(grad_outputs.size())) {
    for (bool one : ctx->saved_data["needed"].toBoolList()) needed.push_back(one);
    for (int64_t i = 0; i < members; ++i) {
      dys.push_back(rows(grad_outputs[i]));
      if (dys.back().defined()) used.push_back(i);
    }
  }

  const Tensor& x() const { return saved[0]; }
  const Tensor& of(Kind kind, int64_t i) const { return saved[1 + kind * members + i]; }
  bool needs_x() const { return needed[0]; }
  bool needs(Kind kind, int64_t i) const { return needed[1 + kind * members + i]; }

  // The places among `saved` of a kind, of the members that are used.
  std::vector<int64_t> places(Kind kind) const {
    std::vector<int64_t> all;
    for (int64_t i : used) all.push_back(1 + kind * members + i);
    return all;
  }
};

// grads[0] is dX, and grads[1 + place] that of the tensor there.
void put_grads(const Backward& at, variable_list& grads) {
  c10::List<bool> asked;
  asked.push_back(at.needs_x());
  OptTensors gates;
  bool reads_x = false;
  for (int64_t i : at.used) {
    for (Kind kind : {kA, kB, kGate}) asked.push_back(at.needs(kind, i));
    gates.push_back(optional(gate_rows(at.of(kGate, i))));
    reads_x = reads_x || at.needs(kA, i);
  }
  const variable_list given = lora_linear_group_backward(
      chosen(at.dys, at.used), reads_x ? optional(rows(at.x())) : std::nullopt,
      optionals(at.saved, at.places(kWeight)), chosen(at.saved, at.places(kA)),
      chosen(at.saved, at.places(kB)), optionals(at.saved, at.places(kH)), gates,
      optionals(at.saved, at.places(kMask)), chosen(at.scalings, at.used), chosen(at.ps, at.used),
      asked);
  size_t next = 0;
  if (at.needs_x()) grads[0] = given[next++];
  for (int64_t i : at.used) {
    for (Kind kind : {kA, kB, kGate}) {
      if (at.needs(kind, i)) grads[1 + kind * at.members + i] = given[next++];
    }
    Tensor& gate = grads[1 + kGate * at.members + i];
    if (gate.defined()) gate = gate.view(at.of(kGate, i).sizes());
    if (at.needs(kWeight, i)) {
      grads[1 + kWeight * at.members + i] = at::mm(at.dys[i].t(), rows(at.x()));
    }
  }
}

// The same as differentiable functions of the inputs, for a second derivative.
void put_grads_to_differentiate(const Backward& at, variable_list& grads) {
  TORCH_CHECK(at.x().defined(),
              "lora_linear_group: a double backward needs the input, which is not saved when no "
              "first derivative reads it (frozen lora_as)");
  variable_list ys;
  for (int64_t i : at.used) {
    ys.push_back(composite({at.x(), at.of(kWeight, i), at.of(kA, i), at.of(kB, i), at.of(kGate, i),
                            Tensor(), at.of(kMask, i), at.scalings[i], at.ps[i]}));
  }
  const auto needs = [&](size_t place) { return at.needed[place]; };
  put_differentiable_grads(ys, chosen(at.dys, at.used), at.saved, at.needed.size(), needs, grads);
}

struct LoraLinearGroup : torch::autograd::Function<LoraLinearGroup> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList tensors,
                               const Given& given) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t members = static_cast<int64_t>(given.ps.size());
    variable_list all(kSaved * members);
    for (size_t i = 0; i < tensors.size(); ++i) all[given.places[i]] = tensors[i];
    const variable_list made = called(rows(x), all, given);
    auto next = made.begin() + members;
    for (int64_t i = 0; i < members; ++i) all[kH * members + i] = *next++;
    for (int64_t i = 0; i < members; ++i) {
      if (given.ps[i] > 0) all[kMask * members + i] = *next++;
    }
    save(ctx, x, std::move(all), given);
    variable_list ys;
    for (int64_t i = 0; i < members; ++i) ys.push_back(with_lead_of(made[i], x));
    return ys;
  }

  static variable_list called(const Tensor& x, const variable_list& all, const Given& given) {
    const int64_t members = static_cast<int64_t>(given.ps.size());
    const auto first = [&](Kind kind) { return all.begin() + kind * members; };
    const auto of = [&](Kind kind) { return variable_list(first(kind), first(kind) + members); };
    OptTensors weights, biases, gates;
    for (int64_t i = 0; i < members; ++i) {
      weights.push_back(*(first(kWeight) + i));
      biases.push_back(optional(*(first(kBias) + i)));
      gates.push_back(optional(gate_rows(*(first(kGate) + i))));
    }
    return lora_linear_group(x, weights, of(kA), of(kB), biases, gates,
                             optional(drawn_seeds(x, given.ps)), given.scalings, given.ps);
  }

  // Of the inputs only what the gradients asked for will read.
  static void save(AutogradContext* ctx, const Tensor& x, variable_list all, const Given& given) {
    const int64_t members = static_cast<int64_t>(given.ps.size());
    c10::List<bool> needed;
    needed.push_back(x.requires_grad());
    for (int64_t place = 0; place < kKinds * members; ++place) {
      needed.push_back(all[place].defined() && all[place].requires_grad());
    }
    const auto needs = [&](Kind kind, int64_t i) { return needed.get(1 + kind * members + i); };
    bool reads_x = false;
    for (int64_t i = 0; i < members; ++i) {
      reads_x = reads_x || needs(kWeight, i) || needs(kA, i);
      const auto drop = [&](Kind kind) { all[kind * members + i] = Tensor(); };
      if (!x.requires_grad() && !needs(kWeight, i)) drop(kWeight);
      if (!needs(kB, i) && !needs(kGate, i)) drop(kH);
      if (!x.requires_grad() && !needs(kA, i)) drop(kMask);
      drop(kBias);
    }
    all.insert(all.begin(), reads_x ? x : Tensor());
    ctx->save_for_backward(std::move(all));
    ctx->saved_data["needed"] = needed;
    ctx->saved_data["places"] = given.places;
    ctx->saved_data["scalings"] = given.scalings;
    ctx->saved_data["ps"] = given.ps;
    ctx->set_materialize_grads(false);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const std::vector<int64_t> places = ctx->saved_data["places"].toIntVector();
    variable_list result(2 + places.size());
    const Backward at(ctx, grad_outputs);
    if (at.used.empty()) return result;
    variable_list grads(at.needed.size());
    const auto sum_biases = [&] {
      for (int64_t i : at.used) {
        if (at.needs(kBias, i)) grads[1 + kBias * at.members + i] = at.dys[i].sum(0);
      }
    };
    if (at::GradMode::is_enabled()) {
      put_grads_to_differentiate(at, grads);
      sum_biases();
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;  // nothing below has a derivative of its own
      put_grads(at, grads);
      sum_biases();
      grads[0] = with_lead_of(grads[0], grad_outputs[at.used[0]]);
    }
    result[0] = grads[0];
    for (size_t i = 0; i < places.size(); ++i) result[1 + i] = grads[1 + places[i]];
    return result;
  }
};

}  // namespace

std::vector<Tensor> lora_linear_group_autograd(const Tensor& x, at::TensorList weights,
                                               at::TensorList lora_as, at::TensorList lora_bs,
                                               const OptTensors& biases, const OptTensors& gates,
                                               at::ArrayRef<double> scalings,
                                               at::ArrayRef<double> dropout_ps) {
  Given given = {{}, scalings.vec(), dropout_ps.vec()};
  variable_list tensors;
  const int64_t members = static_cast<int64_t>(weights.size());
  const auto add = [&](Kind kind, int64_t i, const Tensor& tensor) {
    if (!tensor.defined()) return;
    tensors.push_back(tensor);
    given.places.push_back(kind * members + i);
  };
  for (int64_t i = 0; i < members; ++i) {
    add(kWeight, i, weights[i]);
    add(kA, i, lora_as[i]);
    add(kB, i, lora_bs[i]);
    add(kBias, i, biases.get(i).value_or(Tensor()));
    add(kGate, i, gates.get(i).value_or(Tensor()));
  }
  return LoraLinearGroup::apply(x, at::TensorList(tensors), given);
}

}  // namespace lora_kernels
