#include "dropped_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

#define LK_LOOPS "dropped_loops.h"
#include "each_version.h"

namespace lora_kernels {
namespace {

// The columns of one chunk of a row of keep bits that are off, one after the other.
template <typename Each>
LK_INLINE void each_dropped(const uint8_t* keep, int64_t begin, int64_t end, Each each) {
  for (int64_t k = begin; k < end; k += 8) {
    uint32_t off = ~keep[k / 8] & 0xFFu;
    if (k + 8 > end) off &= (1u << (end - k)) - 1;
    for (; off; off &= off - 1) each(k + __builtin_ctz(off));
  }
}

void subtract_chunk(const Subtraction& p, Range rows, Range columns, int64_t chunk,
                    const float* panel) {
  LK_DISPATCH(subtract_chunk(p, rows, columns, chunk, panel));
}

void replace_piece(const Replacement& p, Range rows, int64_t chunk, Range piece,
                   const float* tile) {
  LK_DISPATCH(replace_piece(p, rows, chunk, piece, tile));
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
