#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include "batch_plan.h"
#include "lora_linear_autograd.h"
#include "multi_lora_linear.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using c10::DispatchKey;

enum Argument { kX, kWeight, kA, kB, kBias, kGate, kTensors, kScaling = kTensors, kP, kArguments };

// What a tensor or a thread has when somebody else wants to see the call.
constexpr c10::DispatchKeySet kOthers(
    {DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PreDispatch,
     DispatchKey::PythonDispatcher, DispatchKey::FuncTorchDynamicLayerFrontMode,
     DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize,
     DispatchKey::Tracer, DispatchKey::Negative, DispatchKey::Conjugate, DispatchKey::ZeroTensor});

bool watched() {
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(kOthers) ||
         at::impl::torch_function_mode_enabled() || at::autocast::is_autocast_enabled(at::kCPU);
}

bool plain(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool known =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
  return known && tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
         !tensor.key_set().has_any(kOthers) && !torch::autograd::isFwGradDefined(tensor);
}

// The tensor that an argument is; false if it is something else. None leaves `tensor` undefined.
bool read_tensor(PyObject* value, Tensor& tensor) {
  if (value == Py_None) return true;
  if (!THPVariable_CheckExact(value)) return false;
  tensor = THPVariable_Unpack(value);
  return plain(tensor);
}

// The tensors among the arguments; false if one is something else.
bool read_tensors(PyObject* const* args, std::array<OptTensor, kTensors>& tensors) {
  for (int i = 0; i < kTensors; ++i) {
    if (args[i] == Py_None) continue;
    if (!THPVariable_CheckExact(args[i])) return false;
    tensors[i] = THPVariable_Unpack(args[i]);
    if (!plain(*tensors[i])) return false;
  }
  return tensors[kX].has_value() && tensors[kA].has_value() && tensors[kB].has_value();
}

bool read_number(PyObject* value, double& number) {
  if (PyFloat_CheckExact(value)) return number = PyFloat_AS_DOUBLE(value), true;
  if (!PyLong_CheckExact(value)) return false;
  number = PyLong_AsDouble(value);
  if (number != -1.0 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool fits(const std::array<OptTensor, kTensors>& tensors) {
  const Tensor &x = *tensors[kX], &a = *tensors[kA], &b = *tensors[kB];
  if (x.dim() < 1 || a.dim() != 2 || b.dim() != 2) return false;
  const int64_t rank = a.size(0), cols = a.size(1), out = b.size(0);
  if (x.size(-1) != cols || b.size(1) != rank) return false;
  const auto is = [&](Argument i, at::IntArrayRef sizes, bool any_dtype) {
    return !tensors[i] || (tensors[i]->sizes() == sizes &&
                           (any_dtype || tensors[i]->scalar_type() == x.scalar_type()));
  };
  return is(kWeight, {out, cols}, false) && is(kBias, {out}, false) && is(kGate, {rank}, true);
}

enum MultiArgument { kY, kRows, kBase, kBaseBias, kStacks, kIds, kFactors, kPlan, kMultiArguments };

// A call of multi_lora() as its arguments say it.
struct MultiCall {
  Tensor y, x, weight, bias, ids, factors;
  std::vector<AdapterStack> stacks;
  int64_t max_rank = 0;
  // Those of the plan, where there is one.
  Tensor order, offsets;

  int64_t adapters() const { return stacks[0].spans.size(0); }

  int64_t width() const {
    int64_t sum = 0;
    for (const AdapterStack& stack : stacks) sum += stack.b_pages.size(1);
    return sum;
  }
};

// A tensor of numbers that only the loops read: whole, of the dtype that they read it as.
bool read_table(PyObject* value, at::ScalarType dtype, Tensor& tensor) {
  if (!THPVariable_CheckExact(value)) return false;
  tensor = THPVariable_Unpack(value);
  return tensor.scalar_type() == dtype && tensor.device().is_cpu() &&
         tensor.layout() == at::kStrided && !tensor.key_set().has_any(kOthers) &&
         tensor.is_contiguous();
}

bool read_stack(PyObject* fields, AdapterStack& stack, int64_t& max_rank) {
  if (!PyTuple_CheckExact(fields) || PyTuple_GET_SIZE(fields) != 6) return false;
  const auto at = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(fields, i); };
  if (!read_tensor(at(0), stack.a_pages) || !read_tensor(at(1), stack.b_pages) ||
      !read_table(at(2), at::kInt, stack.pages) || !read_table(at(3), at::kInt, stack.spans) ||
      !read_table(at(4), at::kFloat, stack.scalings) || !PyLong_CheckExact(at(5))) {
    return false;
  }
  max_rank = std::max<int64_t>(max_rank, PyLong_AsLong(at(5)));
  return stack.a_pages.defined() && stack.b_pages.defined() && stack.a_pages.dim() == 2 &&
         stack.b_pages.dim() == 2;
}

bool read_stacks(PyObject* stacks, MultiCall& call) {
  if (!PyTuple_CheckExact(stacks) || PyTuple_GET_SIZE(stacks) == 0) return false;
  call.stacks.resize(PyTuple_GET_SIZE(stacks));
  for (size_t i = 0; i < call.stacks.size(); ++i) {
    AdapterStack& stack = call.stacks[i];
    if (!read_stack(PyTuple_GET_ITEM(stacks, i), stack, call.max_rank)) return false;
    const int64_t adapters = call.adapters();
    const bool alike = stack.a_pages.size(1) == call.stacks[0].a_pages.size(1) &&
                       stack.spans.sizes() == at::IntArrayRef({adapters, 2}) &&
                       stack.scalings.numel() == adapters;
    if (!alike) return false;
  }
  return true;
}

// The plan's tensors in the order of ops/batch_plan.py.
bool read_plan(PyObject* plan, MultiCall& call) {
  if (plan == Py_None) return true;
  if (!PyTuple_Check(plan) || PyTuple_GET_SIZE(plan) != 4) return false;
  return read_table(PyTuple_GET_ITEM(plan, 1), at::kInt, call.order) &&
         read_table(PyTuple_GET_ITEM(plan, 2), at::kInt, call.offsets) &&
         call.order.numel() == call.ids.numel() && call.offsets.numel() == call.adapters() + 2;
}

bool read_multi(PyObject* const* args, MultiCall& call) {
  return read_tensor(args[kY], call.y) && read_tensor(args[kRows], call.x) &&
         read_tensor(args[kBase], call.weight) && read_tensor(args[kBaseBias], call.bias) &&
         read_stacks(args[kStacks], call) && read_table(args[kIds], at::kLong, call.ids) &&
         read_tensor(args[kFactors], call.factors) && read_plan(args[kPlan], call);
}

// Whether every id is that of an adapter, or negative.
bool known(const Tensor& ids, int64_t adapters) {
  const auto* id = ids.const_data_ptr<int64_t>();
  return std::all_of(id, id + ids.numel(), [&](int64_t i) { return i < adapters; });
}

// Whether there is an id for each row of x, or with factors as many of both for each.
bool fit_rows(const MultiCall& call, at::IntArrayRef rows) {
  const auto ids = call.ids.sizes();
  if (!call.factors.defined()) return ids == rows;
  return ids.size() == rows.size() + 1 && ids.slice(0, rows.size()) == rows &&
         call.factors.sizes() == ids;
}

bool fits(const MultiCall& call) {
  const Tensor& x = call.x;
  if (!x.defined() || x.dim() < 1 || x.numel() == 0) return false;
  const int64_t cols = call.stacks[0].a_pages.size(1), width = call.width();
  if (x.size(-1) != cols) return false;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const auto like_x = [&](const Tensor& t, at::IntArrayRef sizes) {
    return !t.defined() || (t.scalar_type() == x.scalar_type() && t.sizes() == sizes);
  };
  auto wide = lead.vec();
  wide.push_back(width);
  return like_x(call.y, wide) && like_x(call.weight, {width, cols}) && like_x(call.bias, {width}) &&
         fit_rows(call, lead) && known(call.ids, call.adapters());
}

bool wants_gradient(const MultiCall& call) {
  if (!at::GradMode::is_enabled()) return false;
  const auto wanted = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
  if (wanted(call.y) || wanted(call.x) || wanted(call.weight) || wanted(call.bias) ||
      wanted(call.factors)) {
    return true;
  }
  return std::any_of(call.stacks.begin(), call.stacks.end(), [&](const AdapterStack& stack) {
    return wanted(stack.a_pages) || wanted(stack.b_pages) || wanted(stack.scalings);
  });
}

// What the deltas are added to.
Tensor base_of(const MultiCall& call) {
  if (call.weight.defined()) return at::linear(call.x, call.weight, call.bias);
  auto sizes = call.x.sizes().vec();
  sizes.back() = call.width();
  Tensor y = at::zeros(sizes, call.x.options());
  return call.bias.defined() ? y.add_(call.bias) : y;
}

void add_deltas(const Tensor& y, const MultiCall& call) {
  const auto matrix = [](const Tensor& t, bool in_place) {
    if (t.dim() == 2) return t;
    return in_place ? t.view({-1, t.size(-1)}) : t.reshape({-1, t.size(-1)});
  };
  std::vector<int32_t> made;
  const int64_t count = call.ids.numel();
  Slots slots{nullptr, nullptr, count};
  if (call.order.defined()) {
    slots.order = call.order.const_data_ptr<int32_t>();
    slots.offsets = call.offsets.const_data_ptr<int32_t>();
  } else {
    made.resize(count + call.adapters() + 2);
    order_slots(call.ids.const_data_ptr<int64_t>(), count, call.adapters(), made.data(),
                made.data() + count);
    slots = {made.data(), made.data() + count, count};
  }
  const Tensor factors = call.factors.defined() ? call.factors.reshape({-1}) : call.factors;
  add_deltas(matrix(y, true), matrix(call.x, false), call.stacks, factors, slots, call.max_rank);
}

}  // namespace

PyObject* direct_lora_linear(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::array<OptTensor, kTensors> tensors;
  double scaling = 0.0, p = 0.0;
  const bool ours = count == kArguments && !watched() && read_tensors(args, tensors) &&
                    fits(tensors) && read_number(args[kScaling], scaling) &&
                    read_number(args[kP], p) && p >= 0.0 && p < 1.0;
  if (!ours) Py_RETURN_NONE;
  RECORD_FUNCTION("lora_kernels::lora_linear", std::vector<c10::IValue>());
  Tensor y;
  {
    pybind11::gil_scoped_release others_may_run;
    y = lora_linear_autograd(*tensors[kX], tensors[kWeight], *tensors[kA], *tensors[kB],
                             tensors[kBias], tensors[kGate], std::nullopt, scaling, p);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* direct_multi_lora(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  MultiCall call;
  const bool ours = count == kMultiArguments && !watched() && read_multi(args, call) &&
                    fits(call) && !wants_gradient(call);
  if (!ours) Py_RETURN_NONE;
  RECORD_FUNCTION("lora_kernels::multi_lora_linear", std::vector<c10::IValue>());
  {
    pybind11::gil_scoped_release others_may_run;
    if (!call.y.defined()) call.y = base_of(call);
    add_deltas(call.y, call);
  }
  if (args[kY] == Py_None) return THPVariable_Wrap(std::move(call.y));
  if (!call.y.is_inference()) torch::autograd::increment_version(call.y);
  return Py_NewRef(args[kY]);
  END_HANDLE_TH_ERRORS
}

}  // namespace lora_kernels
