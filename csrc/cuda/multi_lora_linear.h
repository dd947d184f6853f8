// The `cuda` backend's multi-adapter ops: tensors in, one launch (two before compute
// capability 9.0) on torch's current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace lora_kernels::cuda {

using at::Tensor;

// The delta of up to kMaxSlots rows, each with one adapter or none; h is not kept.
std::tuple<Tensor, Tensor> multi_lora_linear(const Tensor& x, const Tensor& a_pages,
                                             const Tensor& b_pages, const Tensor& pages,
                                             const Tensor& spans, const Tensor& coef,
                                             const Tensor& order, const Tensor& offsets,
                                             const Tensor& tiles, const std::optional<Tensor>& mask,
                                             const std::optional<Tensor>& keep_scale,
                                             int64_t max_rank, bool keep_h);

// Adds the deltas of linears that share x into y, side by side, kMaxProjections of them a launch;
// each row has one adapter or none, and y keeps the bits of rows that have none.
void multi_lora_linear_add(const Tensor& y, const Tensor& x, at::TensorList a_pages,
                           at::TensorList b_pages, at::TensorList pages, at::TensorList spans,
                           at::TensorList scalings, const std::optional<Tensor>& weights,
                           const Tensor& order, const Tensor& offsets, const Tensor& tiles,
                           const std::optional<Tensor>& table, int64_t max_rank,
                           bool batch_invariant);

// x W' + bias + the delta, for up to kLinearRows rows.
Tensor multi_lora_linear_fused(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& a_pages,
                               const Tensor& b_pages, const Tensor& pages, const Tensor& spans,
                               const Tensor& scalings, const std::optional<Tensor>& weights,
                               const Tensor& order, const Tensor& offsets, const Tensor& tiles,
                               int64_t max_rank);

}  // namespace lora_kernels::cuda
