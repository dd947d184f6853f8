// The loops of activation_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

// The part of a row of a factor and of a gradient that stays in the first-level cache.
constexpr int64_t kCached = 1 << 14;
// Columns that one chain of additions runs over at most, for narrow ranks.
constexpr int64_t kColumnsOfChain = 128;

// Asks for the rows that are read next: x comes in short runs of a strip, which the hardware's own
// prefetching does not follow from one row to the next.
template <int Rows>
LK_INLINE void ask(const Activation& x, int64_t row, Range cols, Range rows) {
  constexpr int64_t kLine = 64;
  if (row + Rows > rows.end) return;
  const int64_t element = bytes(x.storage);
  const char* data = static_cast<const char*>(x.data) + (row * x.stride + cols.begin) * element;
  for (int i = 0; i < Rows; ++i) {
    const char* line = data + i * x.stride * element;
    for (int64_t at = 0; at < (cols.end - cols.begin) * element; at += kLine) {
      __builtin_prefetch(line + at);
    }
  }
}

// The sums of rows of x with V vectors of the factor. One vector has its even and odd columns
// apart: a sum would wait for itself at each column. The sums of a strip start at zero: a chain
// over all of a row's columns would round worse than a GEMM.
template <int Rows, int V, typename Math>
LK_INLINE void shrink_block(const Math* x, int64_t stride, int64_t cols, const Products<Math>& p) {
  constexpr int kApart = V == 1 ? 2 : 1;
  VectorOf<Math> sums[kApart][Rows][V] = {};
  int64_t k = 0;
  const auto add = [&](int64_t column, int part) LK_LAMBDA {
    VectorOf<Math> factor[V];
    for (int v = 0; v < V; ++v) {
      factor[v] = vector(p.factor + column * p.rank + v * kWidth<Math>);
    }
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < V; ++v) sums[part][i][v] += x[i * stride + column] * factor[v];
    }
  };
  for (; k + kApart <= cols; k += kApart) {
    for (int part = 0; part < kApart; ++part) add(k + part, part);
  }
  if (k < cols) add(k, 0);
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < V; ++v) {
      for (int part = 1; part < kApart; ++part) sums[0][i][v] += sums[part][i][v];
      vector(p.shrunk + i * p.rank + v * kWidth<Math>) += sums[0][i][v];
    }
  }
}

// What rows of x add to V vectors of each column's outer product.
template <int Rows, int V, typename Math>
LK_INLINE void outer_block(const Math* x, int64_t stride, int64_t cols, const Products<Math>& p) {
  VectorOf<Math> vectors[Rows][V];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < V; ++v) {
      vectors[i][v] = vector(p.vectors + i * p.rank + v * kWidth<Math>);
    }
  }
  for (int64_t k = 0; k < cols; ++k) {
    Math* to = p.outer + k * p.rank;
    VectorOf<Math> outer[V];
    for (int v = 0; v < V; ++v) outer[v] = vector(to + v * kWidth<Math>);
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < V; ++v) outer[v] += x[i * stride + k] * vectors[i][v];
    }
    for (int v = 0; v < V; ++v) vector(to + v * kWidth<Math>) = outer[v];
  }
}

// Both, for one vector: each element of x is read once.
template <int Rows, typename Math>
LK_INLINE void both_block(const Math* x, int64_t stride, int64_t cols, const Products<Math>& p) {
  VectorOf<Math> sums[Rows] = {}, vectors[Rows];
  for (int i = 0; i < Rows; ++i) vectors[i] = vector(p.vectors + i * p.rank);
  for (int64_t k = 0; k < cols; ++k) {
    const VectorOf<Math> factor = vector(p.factor + k * p.rank);
    VectorOf<Math> outer = vector(p.outer + k * p.rank);
    for (int i = 0; i < Rows; ++i) {
      sums[i] += x[i * stride + k] * factor;
      outer += x[i * stride + k] * vectors[i];
    }
    vector(p.outer + k * p.rank) = outer;
  }
  for (int i = 0; i < Rows; ++i) vector(p.shrunk + i * p.rank) += sums[i];
}

template <typename Math>
LK_INLINE void advance(Products<Math>& p, int64_t lanes) {
  if (p.shrunk) p.shrunk += lanes, p.factor += lanes;
  if (p.outer) p.vectors += lanes, p.outer += lanes;
}

template <int Rows, typename Math>
LK_INLINE void blocks(const Math* x, int64_t stride, int64_t cols, Products<Math> p) {
  const int64_t vectors = p.rank / kWidth<Math>;
  if (vectors == 1 && p.outer && p.shrunk) return both_block<Rows>(x, stride, cols, p);
  for (int64_t left = vectors, now; left > 0; left -= now) {
    now = vectors_now(left);
    with_vectors(now, [&](auto count) LK_LAMBDA {
      constexpr int V = decltype(count)::value;
      if (p.shrunk) shrink_block<Rows, V>(x, stride, cols, p);
      if (p.outer) outer_block<Rows, V>(x, stride, cols, p);
      advance(p, V * kWidth<Math>);
    });
  }
}

// Rows [0, count) of a strip of x as Math, dropped out: in place where that is what x holds.
template <typename Math>
LK_INLINE const Math* load(const Activation& x, int64_t row, Range cols, int count, Math* tile,
                           int64_t* stride) {
  const int64_t start = row * x.stride + cols.begin, width = cols.end - cols.begin;
  const bool wide = stored_as<Math>(x.storage);
  if (wide && !x.keep) {
    *stride = x.stride;
    return static_cast<const Math*>(x.data) + start;
  }
  *stride = kStrip;
  if (!wide) {
    typed<Math>(x.data, x.storage, [&](const auto* from) LK_LAMBDA {
      for (int i = 0; i < count; ++i) {
        widen_row(tile + i * kStrip, from + start + i * x.stride, width);
      }
    });
  }
  for (int i = 0; i < count && x.keep; ++i) {
    Math* to = tile + i * kStrip;
    const Math* source = wide ? static_cast<const Math*>(x.data) + start + i * x.stride : to;
    const uint8_t* keep = x.keep + (row + i) * x.keep_stride + cols.begin / 8;
    drop_row(to, source, keep, width, static_cast<Math>(x.scale));
  }
  return tile;
}

template <typename Math>
LK_INLINE Products<Math> moved(Products<Math> p, int64_t row, int64_t col) {
  if (p.shrunk) p.shrunk += row * p.rank, p.factor += col * p.rank;
  if (p.outer) p.vectors += row * p.rank, p.outer += col * p.rank;
  return p;
}

// Columns whose parts of a factor and of a gradient fit the cache; whole bytes of keep bits.
template <typename Math>
LK_INLINE int64_t columns_at_once(const Products<Math>& p) {
  const int64_t each = p.rank * sizeof(Math) * ((p.shrunk != nullptr) + (p.outer != nullptr));
  return std::clamp<int64_t>(kCached / std::max<int64_t>(each, 1) / 32 * 32, 32, kColumnsOfChain);
}

template <typename Math>
LK_INLINE void accumulate_strips(const Activation& x, Range rows, Range cols,
                                 const Products<Math>& p) {
  alignas(64) Math tile[kTileRows * kStrip];
  const int64_t each = columns_at_once(p);
  int64_t stride;
  for (int64_t k = cols.begin; k < cols.end; k += each) {
    const Range strip = {k, std::min(k + each, cols.end)};
    int64_t m = rows.begin;
    for (; m + kTileRows <= rows.end; m += kTileRows) {
      const Math* from = load(x, m, strip, kTileRows, tile, &stride);
      ask<kTileRows>(x, m + kTileRows, strip, rows);
      blocks<kTileRows>(from, stride, strip.end - k, moved(p, m, k));
    }
    for (; m < rows.end; ++m) {
      const Math* from = load(x, m, strip, 1, tile, &stride);
      blocks<1>(from, stride, strip.end - k, moved(p, m, k));
    }
  }
}

// Elements of out from column k on, through the mask, or added to what is there.
template <typename Math>
LK_INLINE void put(const Expansion<Math>& e, int64_t row, int64_t k, const VectorOf<Math>& sum) {
  VectorOf<Math> value = sum * e.scale;
  if (e.keep) value = kept<Math>(value, e.keep + row * e.keep_stride, k);
  VectorOf<Math>& to = vector(static_cast<Math*>(e.out) + row * e.cols + k);
  to = e.add ? to + value : value;
}

// Rows by V vectors of vectors · factor from column k on, in registers; then each(row, column,
// sum) for every vector.
template <int Rows, int V, typename Math, typename Each>
LK_INLINE void expand_block(const Expansion<Math>& e, int64_t row, int64_t k, Each each) {
  VectorOf<Math> sums[Rows][V] = {};
  const Math* vectors = e.vectors + row * e.vector_stride;
  const Math* factor = e.factor + k;
  for (int64_t r = 0; r < e.rank; ++r) {
    VectorOf<Math> f[V];
    for (int v = 0; v < V; ++v) f[v] = vector(factor + r * e.factor_stride + v * kWidth<Math>);
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < V; ++v) sums[i][v] += vectors[i * e.vector_stride + r] * f[v];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < V; ++v) each(row + i, k + v * kWidth<Math>, sums[i][v]);
  }
}

// One element of vectors · factor.
template <typename Math>
LK_INLINE Math expanded(const Expansion<Math>& e, int64_t row, int64_t k) {
  Math sum = 0;
  for (int64_t r = 0; r < e.rank; ++r) {
    sum += e.vectors[row * e.vector_stride + r] * e.factor[r * e.factor_stride + k];
  }
  return sum;
}

// The whole vectors in `cols` of some rows; returns where the rest begins.
template <int Rows, typename Math, typename Each>
LK_INLINE int64_t expand_rows(const Expansion<Math>& e, int64_t row, Range cols, Each each) {
  constexpr int64_t kPair = 2 * kWidth<Math>;
  int64_t k = cols.begin;
  for (; k + kPair <= cols.end; k += kPair) expand_block<Rows, 2>(e, row, k, each);
  if (k + kWidth<Math> <= cols.end) {
    expand_block<Rows, 1>(e, row, k, each);
    k += kWidth<Math>;
  }
  return k;
}

// Some rows of a strip where out holds what is summed.
template <int Rows, typename Math>
LK_INLINE void expand_in_place(const Expansion<Math>& e, int64_t row, Range cols) {
  const auto each = [&](int64_t m, int64_t k, const VectorOf<Math>& sum)
                        LK_LAMBDA { put(e, m, k, sum); };
  for (int64_t k = expand_rows<Rows>(e, row, cols, each); k < cols.end; ++k) {
    for (int64_t m = row; m < row + Rows; ++m) {
      const bool on = !e.keep || (e.keep[m * e.keep_stride + k / 8] >> (k % 8) & 1);
      const Math value = on ? expanded(e, m, k) * e.scale : Math(0);
      Math& to = static_cast<Math*>(e.out)[m * e.cols + k];
      to = e.add ? to + value : value;
    }
  }
}

// Writes a row of a strip, which is made in `line`, in the storage type of out.
template <typename Math>
LK_INLINE void store(const Expansion<Math>& e, int64_t row, Range cols, Math* line) {
  const int64_t width = cols.end - cols.begin;
  if (e.keep) {
    drop_row(line, line, e.keep + row * e.keep_stride + cols.begin / 8, width, e.scale);
  } else {
    for (int64_t k = 0; k < width; ++k) line[k] *= e.scale;
  }
  typed<Math>(e.out, e.storage, [&](const auto* base) LK_LAMBDA {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(base)>>;
    auto* to = const_cast<Element*>(base) + row * e.cols + cols.begin;
    if (e.add) {
      Math before[kStrip];
      widen_row(before, to, width);
      for (int64_t k = 0; k < width; ++k) line[k] += before[k];
    }
    narrow_row(to, line, width);
  });
}

// Some rows of a strip through a tile in memory.
template <int Rows, typename Math>
LK_INLINE void expand_by_tile(const Expansion<Math>& e, int64_t row, Range cols, Math* tile) {
  const auto each = [&](int64_t m, int64_t k, const VectorOf<Math>& sum)
                        LK_LAMBDA { vector(tile + (m - row) * kStrip + k - cols.begin) = sum; };
  for (int64_t k = expand_rows<Rows>(e, row, cols, each); k < cols.end; ++k) {
    for (int i = 0; i < Rows; ++i) tile[i * kStrip + k - cols.begin] = expanded(e, row + i, k);
  }
  for (int i = 0; i < Rows; ++i) store(e, row + i, cols, tile + i * kStrip);
}

template <int Rows, typename Math>
LK_INLINE void expand_strip(const Expansion<Math>& e, int64_t row, Range cols, Math* tile) {
  if (stored_as<Math>(e.storage)) {
    expand_in_place<Rows>(e, row, cols);
  } else {
    expand_by_tile<Rows>(e, row, cols, tile);
  }
}

template <typename Math>
LK_INLINE void expand_strips(const Expansion<Math>& e, Range rows) {
  alignas(64) Math tile[kTileRows * kStrip];
  for (int64_t k = 0; k < e.cols; k += kStrip) {
    const Range strip = {k, std::min(k + kStrip, e.cols)};
    int64_t m = rows.begin;
    for (; m + kTileRows <= rows.end; m += kTileRows) expand_strip<kTileRows>(e, m, strip, tile);
    for (; m < rows.end; ++m) expand_strip<1>(e, m, strip, tile);
  }
}

// How far ahead in a row of a weight is asked for.
constexpr int64_t kElementsAhead = 64;

// lanes += (w + vectors * factor)^2 for V vectors from column k on, in registers.
template <int Rows, int V, typename Math>
LK_INLINE void add_squares(const Expansion<Math>& e, int64_t row, int64_t k, const Math* w,
                           int64_t stride, VectorOf<Math>* lanes) {
  VectorOf<Math> sums[Rows][V];
  for (int i = 0; i < Rows; ++i) {
    __builtin_prefetch(w + i * stride + kElementsAhead);
    for (int v = 0; v < V; ++v) sums[i][v] = vector(w + i * stride + v * kWidth<Math>);
  }
  const Math* vectors = e.vectors + row * e.vector_stride;
  for (int64_t r = 0; r < e.rank; ++r) {
    VectorOf<Math> f[V];
    for (int v = 0; v < V; ++v) {
      f[v] = vector(e.factor + r * e.factor_stride + k + v * kWidth<Math>);
    }
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < V; ++v) sums[i][v] += vectors[i * e.vector_stride + r] * f[v];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < V; ++v) lanes[i] += sums[i][v] * sums[i][v];
  }
}

// What a strip adds to the sum of each row: whole vectors in lanes, the rest one by one.
template <int Rows, typename Math>
LK_INLINE void norm_strip(const Expansion<Math>& e, int64_t row, Range cols, const Math* w,
                          int64_t stride, double* totals) {
  constexpr int64_t kOne = kWidth<Math>;
  VectorOf<Math> lanes[Rows] = {};
  const int64_t width = cols.end - cols.begin;
  int64_t k = 0;
  for (; k + 2 * kOne <= width; k += 2 * kOne) {
    add_squares<Rows, 2>(e, row, cols.begin + k, w + k, stride, lanes);
  }
  for (; k + kOne <= width; k += kOne) {
    add_squares<Rows, 1>(e, row, cols.begin + k, w + k, stride, lanes);
  }
  for (int i = 0; i < Rows; ++i) {
    totals[i] += sum_of_lanes<Math>(lanes[i]);
    for (int64_t c = k; c < width; ++c) {
      const Math sum = w[i * stride + c] + expanded(e, row + i, cols.begin + c);
      totals[i] += static_cast<double>(sum) * sum;
    }
  }
}

template <int Rows, typename Math>
LK_INLINE void norm_block(const Norms<Math>& n, int64_t row) {
  alignas(64) Math tile[Rows * kStrip];
  double totals[Rows] = {};
  int64_t stride;
  for (int64_t k = 0; k < n.expansion.cols; k += kStrip) {
    const Range strip = {k, std::min(k + kStrip, n.expansion.cols)};
    const Math* w = load(n.w, row, strip, Rows, tile, &stride);
    norm_strip<Rows>(n.expansion, row, strip, w, stride, totals);
  }
  for (int i = 0; i < Rows; ++i) n.out[row + i] = static_cast<Math>(__builtin_sqrt(totals[i]));
}

template <typename Math>
LK_INLINE void norm_blocks(const Norms<Math>& n, Range rows) {
  int64_t m = rows.begin;
  for (; m + kTileRows <= rows.end; m += kTileRows) norm_block<kTileRows>(n, m);
  for (; m < rows.end; ++m) norm_block<1>(n, m);
}

// A square of kWidth by kWidth in registers, and what is left element by element.
template <typename Math>
LK_INLINE void transpose_matrix(const Math* in, int64_t in_stride, Math* out, int64_t out_stride,
                                int64_t rows, Range cols) {
  constexpr int64_t kOne = kWidth<Math>;
  for (int64_t k = cols.begin; k < cols.end; k += kOne) {
    const int64_t width = std::min(kOne, cols.end - k);
    int64_t m = 0;
    for (; width == kOne && m + kOne <= rows; m += kOne) {
      transpose_square(in + m * in_stride + k, in_stride, out + k * out_stride + m, out_stride);
    }
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = m; i < rows; ++i) out[(k + j) * out_stride + i] = in[i * in_stride + k + j];
    }
  }
}

}  // namespace

LK_LOOP void accumulate(const Activation& x, Range rows, Range cols, const Products<float>& p) {
  accumulate_strips(x, rows, cols, p);
}

LK_LOOP void accumulate(const Activation& x, Range rows, Range cols, const Products<double>& p) {
  accumulate_strips(x, rows, cols, p);
}

LK_LOOP void expand(const Expansion<float>& e, Range rows) { expand_strips(e, rows); }

LK_LOOP void expand(const Expansion<double>& e, Range rows) { expand_strips(e, rows); }

LK_LOOP void norms(const Norms<float>& n, Range rows) { norm_blocks(n, rows); }

LK_LOOP void norms(const Norms<double>& n, Range rows) { norm_blocks(n, rows); }

LK_LOOP void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride,
                       int64_t rows, Range cols) {
  transpose_matrix(in, in_stride, out, out_stride, rows, cols);
}

LK_LOOP void transpose(const double* in, int64_t in_stride, double* out, int64_t out_stride,
                       int64_t rows, Range cols) {
  transpose_matrix(in, in_stride, out, out_stride, rows, cols);
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
