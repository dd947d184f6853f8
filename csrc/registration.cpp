// Implementations only: the schemas live in lora_kernels/_ops.py, so that a pure-Python install
// works.
#include <Python.h>
#include <torch/library.h>

#include "cpu/batch_plan.h"
#include "cpu/dora_linear.h"
#include "cpu/dropout.h"
#include "cpu/invariant_linear.h"
#include "cpu/lora_linear.h"
#include "cpu/lora_linear_autograd.h"
#include "cpu/lora_linear_group.h"
#include "cpu/low_rank_norm.h"
#include "cpu/multi_lora_linear.h"
#include "cpu/panel_pass.h"
#include "cpu/products.h"
#include "cpu/quantized_linear.h"
#include "cpu/stacked_lora.h"

TORCH_LIBRARY_IMPL(lora_kernels, CPU, library) {
  library.impl("cpp_low_rank_norm", lora_kernels::low_rank_norm);
  library.impl("cpp_dora_linear", lora_kernels::dora_linear);
  library.impl("cpp_dora_linear_backward", lora_kernels::dora_linear_backward);
  library.impl("cpp_dropout_mask", lora_kernels::dropout_mask);
  library.impl("cpp_row_dropout_mask", lora_kernels::row_dropout_mask);
  library.impl("cpp_multi_lora_linear", lora_kernels::multi_lora_linear);
  library.impl("cpp_multi_lora_linear_backward", lora_kernels::multi_lora_linear_backward);
  library.impl("cpp_stacked_lora_shrink", lora_kernels::stacked_lora_shrink);
  library.impl("cpp_stacked_lora_expand", lora_kernels::stacked_lora_expand);
  library.impl("cpp_stacked_lora_linear", lora_kernels::stacked_lora_linear);
  library.impl("cpp_multi_lora_linear_add", lora_kernels::multi_lora_linear_add);
  library.impl("cpp_batch_plan", lora_kernels::batch_plan);
  library.impl("cpp_invariant_linear", lora_kernels::invariant_linear);
  library.impl("cpp_lora_linear_group", lora_kernels::lora_linear_group);
  library.impl("cpp_lora_linear_group_backward", lora_kernels::lora_linear_group_backward);
  library.impl("cpp_dequantize", lora_kernels::dequantize);
  library.impl("cpp_quantized_linear", lora_kernels::quantized_linear);
  library.impl("cpp_quantized_lora_linear", lora_kernels::quantized_lora_linear);
  library.impl("cpp_lora_linear", lora_kernels::lora_linear);
  library.impl("cpp_lora_linear_backward", lora_kernels::lora_linear_backward);
}

TORCH_LIBRARY_IMPL(lora_kernels, CompositeImplicitAutograd, library) {
  library.impl("cpp_lora_linear_autograd", lora_kernels::lora_linear_autograd);
}

namespace {

// multiply_by(0, 1 or 2): the place in lora_kernels/_extension.py's MULTIPLIERS.
PyObject* multiply_by(PyObject*, PyObject* choice) {
  const long place = PyLong_AsLong(choice);
  if (place == -1 && PyErr_Occurred()) return nullptr;
  lora_kernels::multiply_by(static_cast<lora_kernels::Multiplier>(place));
  Py_RETURN_NONE;
}

PyObject* panels_are_faster(PyObject*, PyObject*) {
  return PyBool_FromLong(lora_kernels::panels_are_faster());
}

PyMethodDef methods[] = {{"multiply_by", multiply_by, METH_O, nullptr},
                         {"panels_are_faster", panels_are_faster, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Importing lora_kernels._C binds the ops above.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
