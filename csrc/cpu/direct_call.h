// Ops as Python calls them where nothing but the arithmetic is to be done: past torch.ops, whose
// way to an op takes longer than the products of a small layer, and past the checks in Python. None
// is returned for anything that asks for more than that: arguments that do not fit, subclasses of
// tensors, other devices, autocast, modes, transforms and tracers. Whoever calls goes the long way
// then.
#pragma once

#include <Python.h>

namespace lora_kernels {

// lora_linear(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p) -> y, with autograd.
PyObject* direct_lora_linear(PyObject* self, PyObject* const* args, Py_ssize_t count);

// multi_lora(y, x, weight, bias, stacks, adapter_ids, weights, plan) -> y plus the deltas of all
// stacks, side by side; without y it is x W' + b. `stacks` are tuples of an AdapterStack's fields.
// None too where a gradient is wanted.
PyObject* direct_multi_lora(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
