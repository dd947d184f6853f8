#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "tensors.h"

namespace lora_kernels {

// y of each member, h of each, the keep bits of those that drop.
std::vector<at::Tensor> lora_linear_group(const at::Tensor& x, const OptTensors& weights,
                                          at::TensorList lora_as, at::TensorList lora_bs,
                                          const OptTensors& biases, const OptTensors& gates,
                                          const std::optional<at::Tensor>& seeds,
                                          at::ArrayRef<double> scalings,
                                          at::ArrayRef<double> dropout_ps);

std::vector<at::Tensor> lora_linear_group_backward(
    at::TensorList dys, const std::optional<at::Tensor>& x, const OptTensors& weights,
    at::TensorList lora_as, at::TensorList lora_bs, const OptTensors& hs, const OptTensors& gates,
    const OptTensors& masks, at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_ps,
    const c10::List<bool>& needs);

}  // namespace lora_kernels
