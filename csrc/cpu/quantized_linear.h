// Linears over a quantised weight, which is `codes`, `scales`, `nested`, `format` and `block`
// (lora_kernels/quant/weight.py).
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace lora_kernels {

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales,
                      const std::optional<at::Tensor>& nested, std::string_view format,
                      int64_t rows, int64_t cols, int64_t block, at::ScalarType dtype);

// out += x W', or out += x W with `transpose`.
void quantized_linear(at::Tensor& out, const at::Tensor& x, const at::Tensor& codes,
                      const at::Tensor& scales, const std::optional<at::Tensor>& nested,
                      std::string_view format, int64_t rows, int64_t cols, int64_t block,
                      bool transpose);

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_lora_linear(
    const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
    const std::optional<at::Tensor>& nested, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& x_lora, const std::optional<at::Tensor>& seed,
    std::string_view format, int64_t block, double scaling, double dropout_p);

}  // namespace lora_kernels
