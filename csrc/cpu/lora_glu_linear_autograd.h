#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

namespace lora_kernels {

// lora_linear of act(gate) * up with its own backward node: the second half of lora_mlp.
at::Tensor lora_glu_linear_autograd(const at::Tensor& gate, const at::Tensor& up,
                                    const at::Tensor& weight, const at::Tensor& lora_a,
                                    const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                                    double scaling, double dropout_p,
                                    const std::string& activation);

}  // namespace lora_kernels
