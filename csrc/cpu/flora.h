#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace lora_kernels {

// Flora's step of one float32 matrix, in the place of the weight, of the running means of its
// gradient's squares by row and by column, and of the momentum where that is a sketch.
void flora_step(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& rows,
                const at::Tensor& cols, const std::optional<at::Tensor>& momentum,
                const std::optional<at::Tensor>& projection, double lr, double beta1, double beta2,
                at::ArrayRef<double> eps, double clip, double decay);

}  // namespace lora_kernels
