// The loops of panel_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

using Vector = VectorOf<float>;
constexpr int kOne = kWidth<float>;

// A tile of `out` that is summed in registers: for each step of the depth, rows and vectors
// together are what is loaded. 6 x 4 loads least of what 32 registers hold and common sizes are
// multiples of.
constexpr int kVectors = kOne == 16 ? 4 : kOne == 8 ? 3 : 2;
constexpr int64_t kPanelRows = kOne == 16 ? 6 : kTileRows, kPanelCols = kVectors * kOne;
// How many tiles of a panel share a packed right factor, which stays in the second cache.
constexpr int64_t kAtOnce = 256 / kPanelCols;

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
      vector(packed + v * kOne) = vector(row + v * kOne);
    }
  }
}

LK_INLINE void pack_whole_squares(const PanelTerm& term, Range depth, int64_t col, float* packed) {
  int64_t k = depth.begin;
  for (; k + kOne <= depth.end; k += kOne) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const float* square = term.right + (col + v * kOne) * term.right_stride + k;
      transpose_square(square, term.right_stride,
                       packed + (k - depth.begin) * kPanelCols + v * kOne, kPanelCols);
    }
  }
  pack_slowly(term, {k, depth.end}, col, kPanelCols, packed + (k - depth.begin) * kPanelCols);
}

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
    for (int v = 0; v < kVectors; ++v) columns[v] = vector(right + v * kOne);
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
      Vector& to = vector(out + i * stride + v * kOne);
      if (add) {
        to += tile.sums[i][v];
      } else {
        to = bias ? tile.sums[i][v] + vector(bias + v * kOne) : tile.sums[i][v];
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

// What store() will add to, or write, is asked for before the tile is summed.
LK_INLINE void prefetch_out(const PanelProduct& p, int64_t row_panel, int64_t col_panel) {
  const int64_t row = row_panel * kPanelRows, rows = std::min(kPanelRows, p.rows - row);
  const float* out = p.out + row * p.out_stride + col_panel * kPanelCols;
  for (int64_t i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + i * p.out_stride + v * kOne, 1);
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
      prefetch_out(p, m, n);
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

// packed[k][row] for kOne columns of a whole panel. The lanes beyond a low panel's rows are written
// over by the columns that follow: kSpilled of them must.
constexpr int64_t kSpilled = kPanelRows < kOne ? panels_of(kOne, kPanelRows) - 1 : 0;

LK_INLINE void pack_columns(const float* rows, int64_t stride, float* packed) {
  if constexpr (kPanelRows < kOne) {
    Vector square[kOne] = {};
    for (int i = 0; i < kPanelRows; ++i) square[i] = vector(rows + i * stride);
    transpose_rows<float>(square);
    for (int k = 0; k < kOne; ++k) vector(packed + k * kPanelRows) = square[k];
  } else {
    for (int64_t i = 0; i < kPanelRows; i += kOne) {
      transpose_square(rows + i * stride, stride, packed + i, kPanelRows);
    }
  }
}

LK_INLINE void pack_panel(const float* rows, int64_t stride, int64_t there, Range depth,
                          float* packed) {
  int64_t k = depth.begin;
  for (; there == kPanelRows && k + kOne + kSpilled <= depth.end; k += kOne) {
    pack_columns(rows + k, stride, packed + (k - depth.begin) * kPanelRows);
  }
  packed += (k - depth.begin) * kPanelRows;
  for (; k < depth.end; ++k, packed += kPanelRows) {
    for (int64_t i = 0; i < kPanelRows; ++i) packed[i] = i < there ? rows[i * stride + k] : 0.0f;
  }
}

}  // namespace

LK_LOOP PanelShape panel_shape() { return {kPanelRows, kPanelCols, kAtOnce}; }

LK_LOOP void pack_rows(const float* matrix, int64_t stride, int64_t rows, int64_t depth,
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

LK_LOOP void multiply_panels(const PanelProduct& p, Range row_panels, Range col_panels,
                             float* scratch) {
  for (int64_t n = col_panels.begin; n < col_panels.end; n += kAtOnce) {
    const Range some = {n, std::min(n + kAtOnce, col_panels.end)};
    multiply_columns(p, row_panels, some, scratch);
  }
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
