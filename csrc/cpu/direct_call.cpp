#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include "lora_linear_autograd.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using c10::DispatchKey;
using OptTensor = std::optional<Tensor>;

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

}  // namespace lora_kernels
