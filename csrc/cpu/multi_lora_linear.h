// The delta of a batch whose rows use different adapters, and its gradients.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace lora_kernels {

std::tuple<at::Tensor, at::Tensor> multi_lora_linear(
    const at::Tensor& x, const at::Tensor& a_pages, const at::Tensor& b_pages,
    const at::Tensor& pages, const at::Tensor& spans, const at::Tensor& coef,
    const at::Tensor& order, const at::Tensor& offsets, const at::Tensor& tiles,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& keep_scale,
    int64_t max_rank, bool keep_h);

std::vector<at::Tensor> multi_lora_linear_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& a_pages,
    const at::Tensor& b_pages, const at::Tensor& pages, const at::Tensor& spans,
    const at::Tensor& coef, const at::Tensor& order, const at::Tensor& offsets,
    const at::Tensor& tiles, const std::optional<at::Tensor>& h,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& keep_scale,
    int64_t max_rank, std::array<bool, 4> needs);

// Adapters of one linear, as ops/adapter_stack.py has them.
struct AdapterStack {
  at::Tensor a_pages, b_pages, pages, spans, scalings;
};

// Which slots are whose, as ops/batch_plan.py has it.
struct Slots {
  const int32_t *order, *offsets;
  int64_t count;
};

// y += the deltas of linears that share x, their columns side by side; y and x are matrices, and
// `weights` is defined where each slot has a factor.
void add_deltas(const at::Tensor& y, const at::Tensor& x, const std::vector<AdapterStack>& stacks,
                const at::Tensor& weights, const Slots& slots, int64_t max_rank);

void multi_lora_linear_add(const at::Tensor& y, const at::Tensor& x, at::TensorList a_pages,
                           at::TensorList b_pages, at::TensorList pages, at::TensorList spans,
                           at::TensorList scalings, const std::optional<at::Tensor>& weights,
                           const at::Tensor& order, const at::Tensor& offsets,
                           const at::Tensor& tiles, const std::optional<at::Tensor>& table,
                           int64_t max_rank, bool batch_invariant);

}  // namespace lora_kernels
