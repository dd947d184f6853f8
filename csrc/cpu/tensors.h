// What the ops ask of tensors. One that is absent is an empty optional among an op's arguments, and
// an undefined tensor elsewhere.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <optional>

namespace lora_kernels {

using OptTensor = std::optional<at::Tensor>;
using OptTensors = c10::List<OptTensor>;

inline bool has(const OptTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline OptTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptTensor(tensor) : std::nullopt;
}

inline bool has_dense_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) <= 1;
}

// The matrix with rows of unit stride.
inline at::Tensor with_dense_rows(const at::Tensor& matrix) {
  return has_dense_rows(matrix) ? matrix : matrix.contiguous();
}

}  // namespace lora_kernels
