// The slots of a batch sorted by adapter, and cut into tiles.
#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

void batch_plan(const at::Tensor& adapter_ids, int64_t adapters, const at::Tensor& ids,
                const at::Tensor& order, const at::Tensor& offsets, const at::Tensor& tiles);

}  // namespace lora_kernels
