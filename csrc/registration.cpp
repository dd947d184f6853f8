// Implementations only: the schemas live in lora_kernels/_ops.py, so that a pure-Python install
// works.
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/batch_plan.h"
#include "cpu/direct_call.h"
#include "cpu/dora_linear.h"
#include "cpu/dropout.h"
#include "cpu/flora.h"
#include "cpu/gate_chain.h"
#include "cpu/invariant_linear.h"
#include "cpu/lora_glu_linear_autograd.h"
#include "cpu/lora_linear.h"
#include "cpu/lora_linear_autograd.h"
#include "cpu/lora_linear_group.h"
#include "cpu/lora_linear_group_autograd.h"
#include "cpu/low_rank_norm.h"
#include "cpu/multi_lora_linear.h"
#include "cpu/quantized_linear.h"
#include "cpu/stacked_lora.h"
#include "cpu/thin_branch_autograd.h"
#include "cpu/version.h"
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
  library.impl("cpp_gate_chain", lora_kernels::gate_chain);
  library.impl("cpp_gate_chain_backward", lora_kernels::gate_chain_backward);
  library.impl("cpp_flora_step", lora_kernels::flora_step);
  library.impl("cpp_lora_linear", lora_kernels::lora_linear);
  library.impl("cpp_lora_linear_backward", lora_kernels::lora_linear_backward);
}

TORCH_LIBRARY_IMPL(lora_kernels, CompositeImplicitAutograd, library) {
  library.impl("cpp_lora_linear_autograd", lora_kernels::lora_linear_autograd);
  library.impl("cpp_cored_linear_autograd", lora_kernels::cored_linear_autograd);
  library.impl("cpp_folded_linear_autograd", lora_kernels::folded_linear_autograd);
  library.impl("cpp_lora_glu_linear_autograd", lora_kernels::lora_glu_linear_autograd);
  library.impl("cpp_lora_linear_group_autograd", lora_kernels::lora_linear_group_autograd);
}

namespace {

// set_ways(bounds, table): of lora_kernels/_cpu_ways.py.
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

// way(op, rows, weight, rank): the place in lora_kernels/_cpu_ways.py's WAYS, for float32.
PyObject* way(PyObject*, PyObject* args) {
  int op;
  long long rows, weight, rank;
  if (!PyArg_ParseTuple(args, "iLLL", &op, &rows, &weight, &rank)) return nullptr;
  return PyLong_FromLong(static_cast<long>(
      lora_kernels::way_of(static_cast<lora_kernels::Op>(op), at::kFloat, {rows, weight, rank})));
}

PyObject* name_of(lora_kernels::Version version) {
  return PyUnicode_FromString(lora_kernels::kVersionNames[static_cast<int>(version)]);
}

// cpu_version(): the name of the loops in use.
PyObject* cpu_version(PyObject*, PyObject*) { return name_of(lora_kernels::version()); }

// cpu_versions(): the names of the loops that this processor can run, the widest first.
PyObject* cpu_versions(PyObject*, PyObject*) {
  const auto versions = lora_kernels::runnable_versions();
  PyObject* names = PyTuple_New(static_cast<Py_ssize_t>(versions.size()));
  for (size_t i = 0; names && i < versions.size(); ++i) {
    PyTuple_SET_ITEM(names, static_cast<Py_ssize_t>(i), name_of(versions[i]));
  }
  return names;
}

// use_cpu_version(place in cpu_versions()).
PyObject* use_cpu_version(PyObject*, PyObject* place) {
  const auto versions = lora_kernels::runnable_versions();
  const size_t at = PyLong_AsSize_t(place);
  if (at == static_cast<size_t>(-1) && PyErr_Occurred()) return nullptr;
  if (at >= versions.size()) {
    PyErr_SetString(PyExc_ValueError, "place: expected one in cpu_versions()");
    return nullptr;
  }
  lora_kernels::chosen_version = versions[at];
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"lora_linear", _PyCFunction_CAST(lora_kernels::direct_lora_linear), METH_FASTCALL, nullptr},
    {"multi_lora", _PyCFunction_CAST(lora_kernels::direct_multi_lora), METH_FASTCALL, nullptr},
    {"set_ways", set_ways, METH_VARARGS, nullptr},
    {"way", way, METH_VARARGS, nullptr},
    {"cpu_version", cpu_version, METH_NOARGS, nullptr},
    {"cpu_versions", cpu_versions, METH_NOARGS, nullptr},
    {"use_cpu_version", use_cpu_version, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Importing lora_kernels._C binds the ops above.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
