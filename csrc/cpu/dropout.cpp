#include "dropout.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "dropout_pass.h"
#include "math_type.h"

namespace lora_kernels {
namespace {

constexpr int64_t kGrain = 1 << 14;

uint32_t threshold(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
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

at::Tensor row_dropout_mask(const at::Tensor& seed, const at::Tensor& dropout_ps, int64_t cols) {
  const int64_t rows = dropout_ps.size(0), width = (cols + 7) / 8;
  at::Tensor mask = at::empty({rows, width}, seed.options().dtype(at::kByte));
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const at::Tensor ps = dropout_ps.to(at::kDouble).contiguous();
  const auto* p = ps.const_data_ptr<double>();
  auto* out = mask.data_ptr<uint8_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       fill_bytes(out, key, row * width, (row + 1) * width, threshold(p[row]));
                     }
                   });
  return mask;
}

at::Tensor dropped(const at::Tensor& x, const at::Tensor& mask) {
  const at::Tensor from = x.contiguous();
  const int64_t rows = from.size(0), cols = from.size(1);
  at::Tensor out = at::empty_like(from);
  in_math(from.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const auto* in = from.const_data_ptr<Math>();
    auto* to = out.mutable_data_ptr<Math>();
    const auto* keep = mask.const_data_ptr<uint8_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t m = begin; m < end; ++m) {
                         drop(to + m * cols, in + m * cols, keep + m * mask.stride(0), cols);
                       }
                     });
  });
  return out;
}

at::Tensor dropout_scale(const at::Tensor& like, const at::Tensor& mask, double p) {
  const at::Tensor bits = at::arange(8, mask.options());
  const at::Tensor keep = mask.unsqueeze(2).bitwise_right_shift(bits).bitwise_and(1);
  return keep.reshape({mask.size(0), -1}).narrow(1, 0, like.size(1)).to(like.scalar_type()) /
         (1 - p);
}

}  // namespace lora_kernels
