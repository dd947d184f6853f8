#include "batch_plan.h"

#include <algorithm>
#include <vector>

namespace lora_kernels {
namespace {

// Slots of one tile; ops/batch_plan.py has the same number.
constexpr int64_t kTileSlots = 16;

// What is no adapter's belongs to adapter `adapters`.
void fill_ids(const at::Tensor& given, int64_t adapters, int64_t* ids, int64_t slots) {
  const at::Tensor wide = given.to(at::kLong).contiguous();
  const auto* from = wide.const_data_ptr<int64_t>();
  const int64_t count = wide.numel();
  for (int64_t i = 0; i < slots; ++i) {
    const bool known = i < count && from[i] >= 0 && from[i] < adapters;
    ids[i] = known ? from[i] : adapters;
  }
}

}  // namespace

void order_slots(const int64_t* ids, int64_t slots, int64_t adapters, int32_t* order,
                 int32_t* offsets) {
  const auto owner = [&](int64_t i) { return ids[i] < 0 ? adapters : std::min(ids[i], adapters); };
  std::fill_n(offsets, adapters + 2, 0);
  for (int64_t i = 0; i < slots; ++i) ++offsets[owner(i) + 1];
  for (int64_t a = 0; a <= adapters; ++a) offsets[a + 1] += offsets[a];
  std::vector<int32_t> next(offsets, offsets + adapters + 1);
  for (int64_t i = 0; i < slots; ++i) order[next[owner(i)]++] = static_cast<int32_t>(i);
}

void batch_plan(const at::Tensor& adapter_ids, int64_t adapters, const at::Tensor& ids,
                const at::Tensor& order, const at::Tensor& offsets, const at::Tensor& tiles) {
  const int64_t slots = ids.numel();
  auto* id = ids.mutable_data_ptr<int64_t>();
  auto* offset = offsets.mutable_data_ptr<int32_t>();
  auto* tile = tiles.mutable_data_ptr<int32_t>();
  fill_ids(adapter_ids, adapters, id, slots);
  order_slots(id, slots, adapters, order.mutable_data_ptr<int32_t>(), offset);
  int64_t made = 0;
  for (int64_t a = 0; a <= adapters; ++a) {
    for (int32_t first = offset[a]; first < offset[a + 1]; first += kTileSlots, ++made) {
      tile[2 * made] = static_cast<int32_t>(a);
      tile[2 * made + 1] = first;
    }
  }
  for (; made < tiles.size(0); ++made) {
    tile[2 * made] = -1;
    tile[2 * made + 1] = 0;
  }
}

}  // namespace lora_kernels
