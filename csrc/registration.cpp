// Implementations only: the schemas live in lora_kernels/_ops.py, so that a pure-Python install
// works.
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/batch_plan.h"
#include "cpu/dora_linear.h"
#include "cpu/dropout.h"
#include "cpu/invariant_linear.h"
#include "cpu/lora_linear.h"
#include "cpu/lora_linear_autograd.h"
#include "cpu/lora_linear_group.h"
#include "cpu/low_rank_norm.h"
#include "cpu/multi_lora_linear.h"
#include "cpu/quantized_linear.h"
#include "cpu/stacked_lora.h"
#include "cpu/ways.h"

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

// set_ways(bounds, table): of lora_kernels/_ways.py.
PyObject* set_ways(PyObject*, PyObject* args) {
  long long bounds[lora_kernels::kBounds];
  PyObject* table;
  if (!PyArg_ParseTuple(args, "(LLLLLL)S", &bounds[0], &bounds[1], &bounds[2], &bounds[3],
                        &bounds[4], &bounds[5], &table)) {
    return nullptr;
  }
  uint8_t ways[lora_kernels::kWays];
  if (PyBytes_GET_SIZE(table) != sizeof(ways)) {
    return PyErr_Format(PyExc_ValueError, "table: expected %d bytes, got %zd", lora_kernels::kWays,
                        PyBytes_GET_SIZE(table));
  }
  std::memcpy(ways, PyBytes_AS_STRING(table), sizeof(ways));
  int64_t upper[lora_kernels::kBounds];
  std::copy(std::begin(bounds), std::end(bounds), upper);
  lora_kernels::set_ways(upper, ways);
  Py_RETURN_NONE;
}

// way(op, rows, weight, rank): the place in lora_kernels/_ways.py's WAYS, for float32.
PyObject* way(PyObject*, PyObject* args) {
  int op;
  long long rows, weight, rank;
  if (!PyArg_ParseTuple(args, "iLLL", &op, &rows, &weight, &rank)) return nullptr;
  return PyLong_FromLong(static_cast<long>(
      lora_kernels::way_of(static_cast<lora_kernels::Op>(op), at::kFloat, {rows, weight, rank})));
}

PyMethodDef methods[] = {{"set_ways", set_ways, METH_VARARGS, nullptr},
                         {"way", way, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Importing lora_kernels._C binds the ops above.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
