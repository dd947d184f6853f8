// From torch's dtypes to the types that the loops are written in.
#pragma once

#include <ATen/ATen.h>

#include "../common/storage.h"

namespace lora_kernels {

// What a dtype is summed in.
inline at::ScalarType math_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Storage::kDouble;
    case at::kHalf:
      return Storage::kHalf;
    case at::kBFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kFloat;
  }
}

// One without data for an undefined tensor.
inline Matrix matrix_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return {nullptr, Storage::kFloat, 0};
  return {tensor.data_ptr(), storage_of(tensor.scalar_type()), tensor.stride(0)};
}

// Calls run with a value of the C++ type of `math`.
template <typename Run>
void in_math(at::ScalarType math, Run run) {
  if (math == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace lora_kernels
