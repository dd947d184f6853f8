#include "dropout.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "../common/philox.h"
#include "../common/simd.h"

namespace lora_kernels {
namespace {

constexpr int64_t kGrain = 1 << 14;

uint32_t threshold(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
}

LK_SIMD void fill_bytes(uint8_t* out, uint64_t seed, int64_t begin, int64_t end, uint32_t limit) {
  for (int64_t i = begin; i < end; ++i) {
    out[i] = keep_byte(seed, static_cast<uint64_t>(i), limit);
  }
}

}  // namespace

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double p) {
  const int64_t width = (cols + 7) / 8;
  at::Tensor mask = at::empty({rows, width}, seed.options().dtype(at::kByte));
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  auto* out = mask.data_ptr<uint8_t>();
  at::parallel_for(0, rows * width, kGrain, [&](int64_t begin, int64_t end) {
    fill_bytes(out, key, begin, end, threshold(p));
  });
  return mask;
}

at::Tensor dropout_scale(const at::Tensor& like, const at::Tensor& mask, double p) {
  const at::Tensor bits = at::arange(8, mask.options());
  const at::Tensor keep = mask.unsqueeze(2).bitwise_right_shift(bits).bitwise_and(1);
  return keep.reshape({mask.size(0), -1}).narrow(1, 0, like.size(1)).to(like.scalar_type()) /
         (1 - p);
}

}  // namespace lora_kernels
