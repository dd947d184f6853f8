#include "dropout.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/philox.h"

// One binary for every x86: the loader picks the widest clone that the machine runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LK_SIMD
#endif

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

// All ones for a kept column, so that a dropped element is an exact zero whatever x holds.
template <typename Bits>
struct KeepTable {
  Bits rows[256][8];
  KeepTable() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int k = 0; k < 8; ++k) rows[byte][k] = (byte >> k & 1) ? ~Bits(0) : Bits(0);
    }
  }
};

template <typename Scalar, typename Bits, typename Math>
inline void drop_element(Scalar* out, const Scalar* x, Bits keep, Math scale) {
  const Scalar scaled = static_cast<Scalar>(static_cast<Math>(*x) * scale);
  Bits bits;
  std::memcpy(&bits, &scaled, sizeof(bits));
  bits &= keep;
  std::memcpy(out, &bits, sizeof(bits));
}

// Eight columns at a time, then the tail: the inner loop has a fixed length to become one vector.
template <typename Scalar, typename Bits, typename Math>
inline __attribute__((always_inline)) void drop_row(Scalar* out, const Scalar* x,
                                                    const uint8_t* mask, int64_t cols, Math scale,
                                                    const KeepTable<Bits>& table) {
  const int64_t whole = cols / 8 * 8;
  for (int64_t k = 0; k < whole; k += 8) {
    const Bits* keep = table.rows[mask[k / 8]];
    for (int j = 0; j < 8; ++j) drop_element(out + k + j, x + k + j, keep[j], scale);
  }
  for (int64_t k = whole; k < cols; ++k) {
    drop_element(out + k, x + k, table.rows[mask[k / 8]][k % 8], scale);
  }
}

LK_SIMD void drop_row_f32(float* out, const float* x, const uint8_t* mask, int64_t cols,
                          float scale, const KeepTable<uint32_t>& table) {
  drop_row(out, x, mask, cols, scale, table);
}

template <typename Scalar, typename Bits, typename Math, typename Row>
void drop_all(at::Tensor& out, const at::Tensor& x, const at::Tensor& mask, double p, Row row) {
  static const KeepTable<Bits> table;
  const int64_t cols = x.size(1), width = mask.size(1);
  const auto scale = static_cast<Math>(1.0 / (1.0 - p));
  auto* to = out.data_ptr<Scalar>();
  const auto* from = x.const_data_ptr<Scalar>();
  const auto* bytes = mask.const_data_ptr<uint8_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      row(to + m * cols, from + m * cols, bytes + m * width, cols, scale, table);
    }
  });
}

template <typename Scalar, typename Bits, typename Math>
void drop_generic(at::Tensor& out, const at::Tensor& x, const at::Tensor& mask, double p) {
  drop_all<Scalar, Bits, Math>(out, x, mask, p, drop_row<Scalar, Bits, Math>);
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

namespace {

void drop_into(at::Tensor& out, const at::Tensor& x, const at::Tensor& mask, double p) {
  switch (x.scalar_type()) {
    case at::kFloat:
      drop_all<float, uint32_t, float>(out, x, mask, p, drop_row_f32);
      break;
    case at::kDouble:
      drop_generic<double, uint64_t, double>(out, x, mask, p);
      break;
    case at::kHalf:
      drop_generic<at::Half, uint16_t, float>(out, x, mask, p);
      break;
    case at::kBFloat16:
      drop_generic<at::BFloat16, uint16_t, float>(out, x, mask, p);
      break;
    default:
      TORCH_CHECK_TYPE(false, "x: expected a floating dtype, got ", x.scalar_type());
  }
}

}  // namespace

at::Tensor dropout_apply(const at::Tensor& x, const at::Tensor& mask, double p) {
  at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  drop_into(out, x.contiguous(), mask, p);
  return out;
}

void dropout_apply_(at::Tensor& x, const at::Tensor& mask, double p) { drop_into(x, x, mask, p); }

}  // namespace lora_kernels
