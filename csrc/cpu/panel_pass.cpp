#include "panel_pass.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace lora_kernels {
namespace {

using Vector = VectorOf<float>;
[[maybe_unused]] typedef int32_t Lanes __attribute__((vector_size(kLanes * sizeof(int32_t))));
constexpr int64_t kVectors = kPanelCols / kLanes;

// From which lane of two vectors in a row a lane comes, where blocks of `Distance` lanes change.
template <int Distance, bool High>
constexpr int source(int lane) {
  const bool second = (lane & Distance) != 0;
  if (High) return second ? static_cast<int>(kLanes) + lane : lane + Distance;
  return second ? static_cast<int>(kLanes) + lane - Distance : lane;
}

template <int Distance, bool High, int... Lane>
LK_INLINE void change_over(const Vector& first, const Vector& second, Vector& out,
                           std::integer_sequence<int, Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  out = __builtin_shufflevector(first, second, source<Distance, High>(Lane)...);
#else  // gcc before 12
  out = __builtin_shuffle(first, second, Lanes{source<Distance, High>(Lane)...});
#endif
}

// Swaps the blocks of `Distance` lanes off the diagonal: one of the four steps of a transposition.
template <int Distance>
LK_INLINE void exchange(Vector (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int i = 0; i < kLanes; ++i) {
    if (i & Distance) continue;
    const Vector first = rows[i], second = rows[i + Distance];
    change_over<Distance, false>(first, second, rows[i], lanes);
    change_over<Distance, true>(first, second, rows[i + Distance], lanes);
  }
}

LK_INLINE void transpose(Vector (&rows)[kLanes]) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

// out[k][n] = in[n][k] for a square as wide as a vector.
LK_INLINE void transpose_square(const float* in, int64_t stride, float* out) {
  Vector rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = vector(in + i * stride);
  transpose(rows);
  for (int i = 0; i < kLanes; ++i) vector(out + i * kPanelCols) = rows[i];
}

// packed[k][n] for `cols` of a panel's columns and a run of depth, zeros beyond `cols`.
LK_INLINE void pack_slowly(const PanelTerm& term, Range depth, int64_t col, int64_t cols,
                           float* packed) {
  for (int64_t k = depth.begin; k < depth.end; ++k) {
    for (int64_t n = 0; n < kPanelCols; ++n) {
      const int64_t place =
          term.transposed ? (col + n) * term.right_stride + k : k * term.right_stride + col + n;
      packed[(k - depth.begin) * kPanelCols + n] = n < cols ? term.right[place] : 0.0f;
    }
  }
}

LK_INLINE void pack_whole_rows(const PanelTerm& term, Range depth, int64_t col, float* packed) {
  for (int64_t k = depth.begin; k < depth.end; ++k, packed += kPanelCols) {
    const float* row = term.right + k * term.right_stride + col;
    for (int64_t v = 0; v < kVectors; ++v) {
      vector(packed + v * kLanes) = vector(row + v * kLanes);
    }
  }
}

LK_INLINE void pack_whole_squares(const PanelTerm& term, Range depth, int64_t col, float* packed) {
  int64_t k = depth.begin;
  for (; k + kLanes <= depth.end; k += kLanes) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const float* square = term.right + (col + v * kLanes) * term.right_stride + k;
      transpose_square(square, term.right_stride,
                       packed + (k - depth.begin) * kPanelCols + v * kLanes);
    }
  }
  pack_slowly(term, {k, depth.end}, col, kPanelCols, packed + (k - depth.begin) * kPanelCols);
}

// The part of a term's depth that a block reads.
struct Part {
  const PanelTerm* term;
  Range depth;
};

int64_t parts_of(int64_t depth) { return panels_of(depth, kPartDepth); }

Range part_of(int64_t depth, int64_t part) {
  const int64_t parts = parts_of(depth);
  return {depth * part / parts, depth * (part + 1) / parts};
}

// The products that are one chain of additions.
struct Block {
  static constexpr int kMost = 16;
  Part parts[kMost];
  int count = 0;
  int64_t depth = 0;

  bool takes(Range run) const {
    return count == 0 || (count < kMost && depth + run.end - run.begin <= kChainDepth);
  }
  void add(const PanelTerm& term, Range run) {
    parts[count++] = {&term, run};
    depth += run.end - run.begin;
  }
};

// The block's rows of every right factor, for one panel of columns.
LK_INLINE void pack_right(const PanelProduct& p, const Block& block, int64_t panel, float* packed) {
  const int64_t col = panel * kPanelCols, cols = std::min(kPanelCols, p.cols - col);
  for (int i = 0; i < block.count; ++i) {
    const auto [term, run] = block.parts[i];
    if (cols < kPanelCols) {
      pack_slowly(*term, run, col, cols, packed);
    } else if (term->transposed) {
      pack_whole_squares(*term, run, col, packed);
    } else {
      pack_whole_rows(*term, run, col, packed);
    }
    packed += (run.end - run.begin) * kPanelCols;
  }
}

struct Tile {
  Vector sums[kPanelRows][kVectors];
};

// tile += left' right over `depth`, for a packed panel of either.
LK_INLINE void accumulate_tile(Tile& tile, const float* left, const float* right, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, left += kPanelRows, right += kPanelCols) {
    Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = vector(right + v * kLanes);
    for (int i = 0; i < kPanelRows; ++i) {
      for (int v = 0; v < kVectors; ++v) tile.sums[i][v] += left[i] * columns[v];
    }
  }
}

LK_INLINE Tile block_tile(const Block& block, int64_t panels, int64_t panel, const float* right) {
  Tile tile = {};
  for (int i = 0; i < block.count; ++i) {
    const Range run = block.parts[i].depth;
    const int64_t depth = run.end - run.begin;
    const float* left =
        block.parts[i].term->left + (run.begin * panels + panel * depth) * kPanelRows;
    accumulate_tile(tile, left, right, depth);
    right += depth * kPanelCols;
  }
  return tile;
}

// A tile within `out`; the first block starts at the bias or at what `out` holds.
LK_INLINE void store_whole(const Tile& tile, float* out, int64_t stride, const float* bias,
                           bool add) {
  for (int i = 0; i < kPanelRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      Vector& to = vector(out + i * stride + v * kLanes);
      if (add) {
        to += tile.sums[i][v];
      } else {
        to = bias ? tile.sums[i][v] + vector(bias + v * kLanes) : tile.sums[i][v];
      }
    }
  }
}

LK_INLINE void store_part(const Tile& tile, float* out, int64_t stride, const float* bias, bool add,
                          int64_t rows, int64_t cols) {
  // Through memory: an index into the tile itself would keep all of it out of registers.
  float sums[kPanelRows * kPanelCols];
  store_whole(tile, sums, kPanelCols, nullptr, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < cols; ++n) {
      const float start = add ? out[i * stride + n] : (bias ? bias[n] : 0.0f);
      out[i * stride + n] = start + sums[i * kPanelCols + n];
    }
  }
}

LK_INLINE void store(const PanelProduct& p, const Tile& tile, int64_t row_panel, int64_t col_panel,
                     bool add) {
  const int64_t row = row_panel * kPanelRows, col = col_panel * kPanelCols;
  const int64_t rows = std::min(kPanelRows, p.rows - row),
                cols = std::min(kPanelCols, p.cols - col);
  float* out = p.out + row * p.out_stride + col;
  const float* bias = p.bias ? p.bias + col : nullptr;
  if (rows == kPanelRows && cols == kPanelCols) {
    store_whole(tile, out, p.out_stride, bias, add);
  } else {
    store_part(tile, out, p.out_stride, bias, add, rows, cols);
  }
}

LK_INLINE void multiply_block(const PanelProduct& p, const Block& block, Range row_panels,
                              Range col_panels, bool add, float* scratch) {
  const int64_t each = block.depth * kPanelCols, panels = panels_of(p.rows, kPanelRows);
  for (int64_t n = col_panels.begin; n < col_panels.end; ++n) {
    pack_right(p, block, n, scratch + (n - col_panels.begin) * each);
  }
  for (int64_t m = row_panels.begin; m < row_panels.end; ++m) {
    for (int64_t n = col_panels.begin; n < col_panels.end; ++n) {
      const float* right = scratch + (n - col_panels.begin) * each;
      store(p, block_tile(block, panels, m, right), m, n, add);
    }
  }
}

// Every block in turn, for so few columns that their packed right factors stay in the cache.
LK_INLINE void multiply_columns(const PanelProduct& p, Range row_panels, Range col_panels,
                                float* scratch) {
  Block block;
  bool add = p.add;
  for (int64_t t = 0; t < p.count; ++t) {
    const int64_t depth = p.terms[t].depth;
    for (int64_t part = 0; part < parts_of(depth); ++part) {
      const Range run = part_of(depth, part);
      if (!block.takes(run)) {
        multiply_block(p, block, row_panels, col_panels, add, scratch);
        block = {}, add = true;
      }
      block.add(p.terms[t], run);
    }
  }
  multiply_block(p, block, row_panels, col_panels, add, scratch);
}

// packed[k][row] for two vectors of columns of a whole panel: a square, its rows the first columns
// of every row and then the second.
LK_INLINE void pack_columns(const float* rows, int64_t stride, float* packed) {
  static_assert(kPanelRows * 2 == kLanes);
  constexpr int64_t kHalf = kPanelRows * sizeof(float);
  Vector square[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    square[i] = vector(rows + i % kPanelRows * stride + i / kPanelRows * kLanes);
  }
  transpose(square);
  for (int k = 0; k < kLanes; ++k) {
    std::memcpy(packed + k * kPanelRows, &square[k], kHalf);
    std::memcpy(packed + (kLanes + k) * kPanelRows,
                reinterpret_cast<const char*>(&square[k]) + kHalf, kHalf);
  }
}

LK_INLINE void pack_panel(const float* rows, int64_t stride, int64_t there, Range depth,
                          float* packed) {
  int64_t k = depth.begin;
  for (; there == kPanelRows && k + 2 * kLanes <= depth.end; k += 2 * kLanes) {
    pack_columns(rows + k, stride, packed + (k - depth.begin) * kPanelRows);
  }
  packed += (k - depth.begin) * kPanelRows;
  for (; k < depth.end; ++k, packed += kPanelRows) {
    for (int64_t i = 0; i < kPanelRows; ++i) packed[i] = i < there ? rows[i * stride + k] : 0.0f;
  }
}

}  // namespace

LK_SIMD void pack_rows(const float* matrix, int64_t stride, int64_t rows, int64_t depth,
                       Range panels, float* packed) {
  const int64_t all = panels_of(rows, kPanelRows);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t first = panel * kPanelRows, there = std::min(kPanelRows, rows - first);
    for (int64_t part = 0; part < parts_of(depth); ++part) {
      const Range run = part_of(depth, part);
      float* to = packed + (run.begin * all + panel * (run.end - run.begin)) * kPanelRows;
      pack_panel(matrix + first * stride, stride, there, run, to);
    }
  }
}

LK_SIMD void multiply_panels(const PanelProduct& p, Range row_panels, Range col_panels,
                             float* scratch) {
  for (int64_t n = col_panels.begin; n < col_panels.end; n += kPanelsAtOnce) {
    const Range some = {n, std::min(n + kPanelsAtOnce, col_panels.end)};
    multiply_columns(p, row_panels, some, scratch);
  }
}

bool panels_are_faster() {
#if defined(__x86_64__) && defined(__GNUC__)
  // Measured on AMD's. Intel's own library knows Intel's processors.
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace lora_kernels
