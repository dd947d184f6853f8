// The slots of a batch sorted by adapter, and cut into tiles.
#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

// order [slots] and offsets [adapters + 2]; what is no adapter's comes last.
void order_slots(const int64_t* ids, int64_t slots, int64_t adapters, int32_t* order,
                 int32_t* offsets);

void batch_plan(const at::Tensor& adapter_ids, int64_t adapters, const at::Tensor& ids,
                const at::Tensor& order, const at::Tensor& offsets, const at::Tensor& tiles);

}  // namespace lora_kernels
