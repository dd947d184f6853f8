#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "lora_linear_group.h"

namespace lora_kernels {

// lora_linear_group of dense weights with its own backward node; x has any leading dimensions.
std::vector<at::Tensor> lora_linear_group_autograd(const at::Tensor& x, at::TensorList weights,
                                                   at::TensorList lora_as, at::TensorList lora_bs,
                                                   const OptTensors& biases,
                                                   const OptTensors& gates,
                                                   at::ArrayRef<double> scalings,
                                                   at::ArrayRef<double> dropout_ps);

}  // namespace lora_kernels
