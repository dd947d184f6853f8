// The loops of gate_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

// Rows of a gate by vectors of tokens whose sums are kept in registers.
constexpr int kSumRows = kManyRegisters ? 8 : 4;
constexpr int kSumVectors = 2;
// The part of a gate's gradient that is.
constexpr int kGradRows = 4;
constexpr int kGradCols = kManyRegisters ? 4 : 2;

// One token's columns, widened, and zeros behind them.
template <typename Math>
LK_INLINE void read_token(Math* to, const Matrix& x, int64_t row, int64_t cols, int64_t places) {
  typed<Math>(x.data, x.storage,
              [&](auto* data) LK_LAMBDA { widen_row(to, data + row * x.stride, cols); });
  std::fill(to + cols, to + places, Math(0));
}

template <typename Math>
LK_INLINE void open_tokens(const Matrix& x, Range rows, int64_t cols, int64_t places, Math* tile,
                           Math* scratch) {
  constexpr int width = kWidth<Math>;
  for (int64_t first = 0; first < kTokens; first += width) {
    for (int i = 0; i < width; ++i) {
      const int64_t row = rows.begin + first + i;
      if (row < rows.end) {
        read_token(scratch + i * places, x, row, cols, places);
      } else {
        std::fill(scratch + i * places, scratch + (i + 1) * places, Math(0));
      }
    }
    for (int64_t at = 0; at < places; at += width) {
      transpose_square(scratch + at, places, tile + at * kTokens + first, kTokens);
    }
  }
}

template <typename Math>
LK_INLINE void write_token(const Matrix& out, int64_t row, int64_t cols, Math* from, bool add,
                           Math* old) {
  typed<Math>(out.data, out.storage, [&](auto* data) LK_LAMBDA {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data) +
               row * out.stride;
    if (add) {
      widen_row(old, to, cols);
      for (int64_t k = 0; k < cols; ++k) from[k] += old[k];
    }
    narrow_row(to, from, cols);
  });
}

template <typename Math>
LK_INLINE void close_tokens(const Math* tile, int64_t places, const Matrix& out, Range rows,
                            int64_t cols, bool add, Math* scratch) {
  constexpr int width = kWidth<Math>;
  for (int64_t first = 0; rows.begin + first < rows.end; first += width) {
    for (int64_t at = 0; at < places; at += width) {
      transpose_square(tile + at * kTokens + first, kTokens, scratch + at, places);
    }
    const int64_t count = std::min<int64_t>(width, rows.end - rows.begin - first);
    for (int64_t i = 0; i < count; ++i) {
      write_token(out, rows.begin + first + i, cols, scratch + i * places, add,
                  scratch + width * places);
    }
  }
}

// `count` of kSumRows rows of out for kSumVectors vectors of tokens.
template <typename Math>
LK_INLINE void gate_rows(const GatePlaces& places, const Math* gate, const Math* in, Math* out,
                         int64_t first, int64_t count) {
  constexpr int width = kWidth<Math>;
  VectorOf<Math> sums[kSumRows][kSumVectors] = {};
  for (int64_t k = 0; k < places.size; ++k) {
    const Math* tokens = in + places.offsets[k];
    const VectorOf<Math> one = vector(tokens), other = vector(tokens + width);
    const Math* factors = gate + k * kGateRows;
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
      sums[r][0] += factors[r] * one;
      sums[r][1] += factors[r] * other;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSumRows; ++r) {
    if (r >= count) break;
    Math* to = out + places.offsets[first + r];
    vector(to) = sums[r][0];
    vector(to + width) = sums[r][1];
  }
}

template <typename Math>
LK_INLINE void apply_rows(const GatePlaces& places, const Math* gate, const Math* in, Math* out) {
  for (int64_t base = 0; base < places.count; ++base) {
    for (int64_t first = 0; first < places.size; first += kSumRows) {
      const Math* packed = gate + first / kGateRows * kGateRows * places.size + first % kGateRows;
      const int64_t count = std::min<int64_t>(kSumRows, places.size - first);
      for (int64_t t = 0; t < kTokens; t += kSumVectors * kWidth<Math>) {
        const int64_t at = places.bases[base] + t;
        gate_rows(places, packed, in + at, out + at, first, count);
      }
    }
  }
}

// sums[i] = the sum of the lanes of vectors[i].
template <typename Math, int Count>
LK_INLINE void sums_of_lanes(const VectorOf<Math> (&vectors)[Count], Math (&sums)[Count]) {
  constexpr int width = kWidth<Math>;
  static_assert(Count % width == 0);
#pragma GCC unroll 16
  for (int first = 0; first < Count; first += width) {
    VectorOf<Math> rows[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = vectors[first + i];
    transpose_rows<Math>(rows);
#pragma GCC unroll 16
    for (int i = 1; i < width; ++i) rows[0] += rows[i];
    vector(sums + first) = rows[0];
  }
}

// The sums of a square of the gradient; of indices beyond the last one, the last's once more.
template <typename Math>
LK_INLINE void grad_square(const GatePlaces& places, const Math* g, const Math* h, int64_t row,
                           int64_t col, Math* grad) {
  int64_t rows[kGradRows], cols[kGradCols];
  for (int i = 0; i < kGradRows; ++i) rows[i] = places.offsets[std::min(row + i, places.size - 1)];
  for (int j = 0; j < kGradCols; ++j) cols[j] = places.offsets[std::min(col + j, places.size - 1)];
  VectorOf<Math> sums[kGradRows * kGradCols] = {};
  for (int64_t base = 0; base < places.count; ++base) {
    for (int64_t t = 0; t < kTokens; t += kWidth<Math>) {
      const int64_t at = places.bases[base] + t;
      VectorOf<Math> read[kGradCols];
#pragma GCC unroll 4
      for (int j = 0; j < kGradCols; ++j) read[j] = vector(h + at + cols[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kGradRows; ++i) {
        const VectorOf<Math> back = vector(g + at + rows[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kGradCols; ++j) sums[i * kGradCols + j] += back * read[j];
      }
    }
  }
  Math found[kGradRows * kGradCols];
  sums_of_lanes<Math>(sums, found);
  for (int64_t i = 0; i < std::min<int64_t>(kGradRows, places.size - row); ++i) {
    for (int64_t j = 0; j < std::min<int64_t>(kGradCols, places.size - col); ++j) {
      grad[(row + i) * places.size + col + j] += found[i * kGradCols + j];
    }
  }
}

template <typename Math>
LK_INLINE void grad_squares(const GatePlaces& places, const Math* g, const Math* h, Math* grad) {
  for (int64_t row = 0; row < places.size; row += kGradRows) {
    for (int64_t col = 0; col < places.size; col += kGradCols) {
      grad_square(places, g, h, row, col, grad);
    }
  }
}

}  // namespace

LK_LOOP void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, float* tile,
                       float* scratch) {
  open_tokens(x, rows, cols, places, tile, scratch);
}

LK_LOOP void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, double* tile,
                       double* scratch) {
  open_tokens(x, rows, cols, places, tile, scratch);
}

LK_LOOP void close_tile(const float* tile, int64_t places, const Matrix& out, Range rows,
                        int64_t cols, bool add, float* scratch) {
  close_tokens(tile, places, out, rows, cols, add, scratch);
}

LK_LOOP void close_tile(const double* tile, int64_t places, const Matrix& out, Range rows,
                        int64_t cols, bool add, double* scratch) {
  close_tokens(tile, places, out, rows, cols, add, scratch);
}

LK_LOOP void apply_gate(const GatePlaces& places, const float* gate, const float* in, float* out) {
  apply_rows(places, gate, in, out);
}

LK_LOOP void apply_gate(const GatePlaces& places, const double* gate, const double* in,
                        double* out) {
  apply_rows(places, gate, in, out);
}

LK_LOOP void sum_gate(const GatePlaces& places, const float* g, const float* h, float* grad) {
  grad_squares(places, g, h, grad);
}

LK_LOOP void sum_gate(const GatePlaces& places, const double* g, const double* h, double* grad) {
  grad_squares(places, g, h, grad);
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
