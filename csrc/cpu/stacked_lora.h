// The delta of a server's batch, from its padded stacks and its segments of rows.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace lora_kernels {

void stacked_lora_shrink(const at::Tensor& x, at::TensorList lora_a, const at::Tensor& order,
                         const at::Tensor& starts, const at::Tensor& counts, const at::Tensor& ids,
                         const at::Tensor& mapping, double scaling, const at::Tensor& h);

void stacked_lora_expand(const at::Tensor& h, at::TensorList lora_b, const at::Tensor& order,
                         const at::Tensor& starts, const at::Tensor& counts, const at::Tensor& ids,
                         int64_t offset, bool add, const at::Tensor& y);

void stacked_lora_linear(const at::Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
                         const std::optional<at::Tensor>& order, const at::Tensor& starts,
                         const at::Tensor& counts, const at::Tensor& ids,
                         const std::optional<at::Tensor>& ranks,
                         const std::optional<at::Tensor>& scalings, double scaling, int64_t offset,
                         bool add, const at::Tensor& y);

}  // namespace lora_kernels
