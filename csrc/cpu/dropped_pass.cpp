#include "dropped_pass.h"

#include <algorithm>
#include <cstring>

#include "../common/simd.h"

namespace lora_kernels {
namespace {

using Lanes = VectorOf<float>;
constexpr int64_t kVectors = kPanel / kLanes;

// The columns of one chunk of a row of keep bits that are off, one after the other.
template <typename Each>
LK_INLINE void each_dropped(const uint8_t* keep, int64_t begin, int64_t end, Each each) {
  for (int64_t k = begin; k < end; k += 8) {
    uint32_t off = ~keep[k / 8] & 0xFFu;
    if (k + 8 > end) off &= (1u << (end - k)) - 1;
    for (; off; off &= off - 1) each(k + __builtin_ctz(off));
  }
}

// line -= the elements' values times their rows of the panel [kChunk, kPanel]; even and odd ones
// apart, or each multiplication would wait for the one before.
LK_INLINE void subtract_row(const DroppedList& list, int64_t begin, int64_t end, const float* panel,
                            float* line) {
  Lanes even[kVectors], odd[kVectors] = {};
  for (int64_t v = 0; v < kVectors; ++v) even[v] = vector(line + v * kLanes);
  int64_t e = begin;
  for (; e + 2 <= end; e += 2) {
    const float* first = panel + list.columns[e] * kPanel;
    const float* second = panel + list.columns[e + 1] * kPanel;
    const float a = list.values[e], b = list.values[e + 1];
    for (int64_t v = 0; v < kVectors; ++v) {
      even[v] -= a * vector(first + v * kLanes);
      odd[v] -= b * vector(second + v * kLanes);
    }
  }
  for (int64_t v = 0; v < kVectors && e < end; ++v) {
    even[v] -= list.values[e] * vector(panel + list.columns[e] * kPanel + v * kLanes);
  }
  for (int64_t v = 0; v < kVectors; ++v) vector(line + v * kLanes) = even[v] + odd[v];
}

LK_SIMD void subtract_chunk(const Subtraction& p, Range rows, Range columns, int64_t chunk,
                            const float* panel) {
  const int64_t width = columns.end - columns.begin;
  alignas(64) float buffer[kPanel] = {};
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t* at = p.list.starts + m * p.list.chunks + chunk;
    float* out = p.out + m * p.out_stride + columns.begin;
    float* line = width == kPanel ? out : buffer;
    if (line != out) std::memcpy(line, out, width * sizeof(float));
    subtract_row(p.list, at[0], at[1], panel, line);
    if (line != out) std::memcpy(out, line, width * sizeof(float));
  }
}

LK_INLINE float product(const float* a, const float* b, int64_t count) {
  Lanes sums[4] = {};
  int64_t n = 0;
  for (; n + 4 * kLanes <= count; n += 4 * kLanes) {
    for (int64_t v = 0; v < 4; ++v) {
      sums[v] += vector(a + n + v * kLanes) * vector(b + n + v * kLanes);
    }
  }
  for (; n + kLanes <= count; n += kLanes) sums[0] += vector(a + n) * vector(b + n);
  const Lanes total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float result = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) result += total[lane];
  for (; n < count; ++n) result += a[n] * b[n];
  return result;
}

LK_SIMD void replace_piece(const Replacement& p, Range rows, int64_t chunk, Range piece,
                           const float* tile) {
  const int64_t count = piece.end - piece.begin;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t* at = p.list.starts + m * p.list.chunks + chunk;
    const float* dy = p.dy + m * p.dy_stride + piece.begin;
    float* dx = p.dx + m * p.dx_stride + chunk * kChunk;
    for (int64_t e = at[0]; e < at[1]; ++e) {
      const int64_t k = p.list.columns[e];
      const float sum = product(dy, tile + k * kPiece, count);
      dx[k] = piece.begin == 0 ? sum : dx[k] + sum;
    }
  }
}

}  // namespace

void count_dropped(const uint8_t* keep, int64_t keep_stride, int64_t cols, Range rows,
                   int64_t* counts) {
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    for (int64_t c = 0; c < chunks; ++c) {
      int64_t count = 0;
      each_dropped(keep + m * keep_stride, c * kChunk, std::min((c + 1) * kChunk, cols),
                   [&](int64_t) { ++count; });
      counts[m * chunks + c] = count;
    }
  }
}

void list_dropped(const uint8_t* keep, int64_t keep_stride, const float* x, int64_t x_stride,
                  int64_t cols, Range rows, const int64_t* starts, uint8_t* columns,
                  float* values) {
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    int64_t next = starts[m * chunks];
    each_dropped(keep + m * keep_stride, 0, cols, [&](int64_t k) {
      columns[next] = static_cast<uint8_t>(k % kChunk);
      if (x) values[next] = x[m * x_stride + k];
      ++next;
    });
  }
}

void subtract(const Subtraction& p, Range rows, Range columns) {
  // In the first-level cache: 128 columns of x by 64 of the output.
  alignas(64) float panel[kChunk * kPanel] = {};
  for (int64_t chunk = 0; chunk < p.list.chunks; ++chunk) {
    const Range k = {0, std::min(kChunk, p.cols - chunk * kChunk)};
    const float* w = p.w + columns.begin * p.w_stride + chunk * kChunk;
    transpose(w, p.w_stride, panel, kPanel, columns.end - columns.begin, k);
    subtract_chunk(p, rows, columns, chunk, panel);
  }
}

void replace(const Replacement& p, Range rows, int64_t chunk, float* tile) {
  const Range k = {0, std::min(kChunk, p.cols - chunk * kChunk)};
  for (int64_t n = 0; n < p.out; n += kPiece) {
    const Range piece = {n, std::min(n + kPiece, p.out)};
    const float* w = p.w + n * p.w_stride + chunk * kChunk;
    transpose(w, p.w_stride, tile, kPiece, piece.end - piece.begin, k);
    replace_piece(p, rows, chunk, piece, tile);
  }
}

}  // namespace lora_kernels
