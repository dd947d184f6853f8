#include "scale_pass.h"

#include <algorithm>
#include <type_traits>

#include "../common/simd.h"
#include "keep_bits.h"

namespace lora_kernels {
namespace {

template <typename Math>
LK_INLINE void read(Math* to, const Matrix& from, int64_t row, int64_t col, int64_t count) {
  typed<Math>(from.data, from.storage, [&](const auto* base) LK_LAMBDA {
    const auto* line = base + row * from.stride + col;
    for (int64_t k = 0; k < count; ++k) to[k] = widen(line[k]);
  });
}

template <typename Math>
LK_INLINE void write(const Matrix& to, int64_t row, int64_t col, int64_t count, const Math* from) {
  typed<Math>(to.data, to.storage, [&](const auto* base) LK_LAMBDA {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(base)>>;
    auto* line = const_cast<Element*>(base) + row * to.stride + col;
    for (int64_t k = 0; k < count; ++k) narrow(line + k, from[k]);
  });
}

// Calls each(row, first column, columns) for every strip of every row.
template <typename Each>
LK_INLINE void strips(Range rows, Range cols, Each each) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    for (int64_t k = cols.begin; k < cols.end; k += kStrip) {
      each(m, k, std::min(kStrip, cols.end - k));
    }
  }
}

template <typename Math>
LK_INLINE void scale(const Scaling<Math>& p, Range rows, int64_t cols) {
  alignas(64) Math line[kStrip], sum[kStrip];
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    read(line, p.z, m, col, width);
    for (int64_t k = 0; k < width; ++k) line[k] *= p.scale[col + k];
    for (int64_t k = 0; k < width && p.bias; ++k) line[k] += p.bias[col + k];
    if (p.accumulate) {
      read(sum, p.y, m, col, width);
      for (int64_t k = 0; k < width; ++k) line[k] += sum[k];
    }
    write(p.y, m, col, width, line);
  });
}

// Rows whose products are summed by themselves first: a long sum in float32 would lose digits.
constexpr int64_t kSumRows = 32;

template <typename Math>
LK_INLINE void unscale_rows(const Unscaling<Math>& p, Range rows, int64_t col, int64_t width) {
  alignas(64) Math dy[kStrip], other[kStrip], sums[kStrip] = {};
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    read(dy, p.dy, m, col, width);
    if (p.sums) {
      read(other, p.z, m, col, width);
      for (int64_t k = 0; k < width; ++k) sums[k] += dy[k] * other[k];
    }
    if (p.scaled.data) {
      for (int64_t k = 0; k < width; ++k) other[k] = dy[k] * p.factor[col + k];
      write(p.scaled, m, col, width, other);
    }
  }
  for (int64_t k = 0; k < width && p.sums; ++k) p.sums[col + k] += sums[k];
}

template <typename Math>
LK_INLINE void unscale(const Unscaling<Math>& p, Range rows, Range cols) {
  for (int64_t col = cols.begin; col < cols.end; col += kStrip) {
    for (int64_t m = rows.begin; m < rows.end; m += kSumRows) {
      const Range block = {m, std::min(m + kSumRows, rows.end)};
      unscale_rows(p, block, col, std::min(kStrip, cols.end - col));
    }
  }
}

template <typename Math>
LK_INLINE void split(const Splitting& p, Range rows, int64_t cols) {
  alignas(64) Math x[kStrip], kept[kStrip];
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    read(x, p.x, m, col, width);
    const uint8_t* bits = p.keep.bits + m * p.keep.stride + col / 8;
    drop_row(kept, x, bits, width, static_cast<Math>(p.keep.scale));
    write(p.dropped, m, col, width, kept);
    for (int64_t k = 0; k < width; ++k) x[k] -= kept[k];
    write(p.rest, m, col, width, x);
  });
}

template <typename Math>
LK_INLINE void keep(const Keeping& p, Range rows, int64_t cols) {
  alignas(64) Math x[kStrip], sum[kStrip];
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    read(x, p.x, m, col, width);
    read(sum, p.sum, m, col, width);
    drop_row(x, x, p.keep.bits + m * p.keep.stride + col / 8, width, Math(1));
    for (int64_t k = 0; k < width; ++k) sum[k] += x[k];
    write(p.sum, m, col, width, sum);
  });
}

LK_SIMD void scale_f32(const Scaling<float>& p, Range rows, int64_t cols) { scale(p, rows, cols); }
LK_SIMD void scale_f64(const Scaling<double>& p, Range rows, int64_t cols) { scale(p, rows, cols); }
LK_SIMD void unscale_f32(const Unscaling<float>& p, Range rows, Range cols) {
  unscale(p, rows, cols);
}
LK_SIMD void unscale_f64(const Unscaling<double>& p, Range rows, Range cols) {
  unscale(p, rows, cols);
}
LK_SIMD void split_f32(const Splitting& p, Range rows, int64_t cols) {
  split<float>(p, rows, cols);
}
LK_SIMD void split_f64(const Splitting& p, Range rows, int64_t cols) {
  split<double>(p, rows, cols);
}
LK_SIMD void keep_f32(const Keeping& p, Range rows, int64_t cols) { keep<float>(p, rows, cols); }
LK_SIMD void keep_f64(const Keeping& p, Range rows, int64_t cols) { keep<double>(p, rows, cols); }

}  // namespace

void run(const Scaling<float>& p, Range rows, int64_t cols) { scale_f32(p, rows, cols); }

void run(const Scaling<double>& p, Range rows, int64_t cols) { scale_f64(p, rows, cols); }

void run(const Unscaling<float>& p, Range rows, Range cols) { unscale_f32(p, rows, cols); }

void run(const Unscaling<double>& p, Range rows, Range cols) { unscale_f64(p, rows, cols); }

void run(const Splitting& p, Range rows, int64_t cols) {
  (p.x.storage == Storage::kDouble ? split_f64 : split_f32)(p, rows, cols);
}

void run(const Keeping& p, Range rows, int64_t cols) {
  (p.x.storage == Storage::kDouble ? keep_f64 : keep_f32)(p, rows, cols);
}

}  // namespace lora_kernels
