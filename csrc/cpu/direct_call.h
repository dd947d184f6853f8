// lora_linear as Python calls it where nothing but the arithmetic is to be done: past torch.ops,
// whose way to an op takes longer than the products of a small layer.
#pragma once

#include <Python.h>

namespace lora_kernels {

// lora_linear(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p) -> y, with autograd. None
// for anything that asks for more than that: arguments that do not fit, subclasses of tensors,
// other devices, autocast, modes, transforms and tracers. Whoever calls goes the long way then.
PyObject* direct_lora_linear(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
