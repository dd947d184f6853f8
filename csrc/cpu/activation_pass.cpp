#include "activation_pass.h"

#include <algorithm>
#include <cstring>

#include "../common/simd.h"
#include "../common/storage.h"
#include "keep_bits.h"

namespace lora_kernels {
namespace {

// Rows worked on at a time: their sums stay in registers.
constexpr int kRows = 8;

// The next rows of x, asked for while this block is computed: x comes in short runs of a strip,
// which the hardware's own prefetching does not follow from one row to the next.
struct Ahead {
  const char* data;
  int64_t stride, element;

  // One eighth of a block's lines for each column of it.
  LK_INLINE void fetch(int64_t k) const {
    __builtin_prefetch(data + (k % kRows) * stride + (k / kRows * kRows) * element);
  }
};

template <int Rows, bool Shrink, bool Outer, typename Math>
LK_INLINE void block(const Math* x, int64_t stride, int64_t cols, const Products<Math>& p,
                     const Ahead& ahead) {
  VectorOf<Math> sums[Rows], vectors[Rows];
  for (int i = 0; i < Rows; ++i) {
    if (Shrink) sums[i] = vector(p.shrunk + i * p.rank);
    if (Outer) vectors[i] = vector(p.vectors + i * p.rank);
  }
  for (int64_t k = 0; k < cols; ++k) {
    VectorOf<Math> factor, outer;
    if (Shrink) factor = vector(p.factor + k * p.rank);
    if (Outer) outer = vector(p.outer + k * p.rank);
    ahead.fetch(k);
    for (int i = 0; i < Rows; ++i) {
      if (Shrink) sums[i] += x[i * stride + k] * factor;
      if (Outer) outer += x[i * stride + k] * vectors[i];
    }
    if (Outer) vector(p.outer + k * p.rank) = outer;
  }
  for (int i = 0; i < Rows && Shrink; ++i) vector(p.shrunk + i * p.rank) = sums[i];
}

// Shrinks alone, even and odd columns apart: one sum a row would wait for itself at each column.
// The sums of a strip start at zero: a chain over all of a row's columns would round worse than a
// GEMM.
template <int Rows, typename Math>
LK_INLINE void shrink_block(const Math* x, int64_t stride, int64_t cols, const Products<Math>& p,
                            const Ahead& ahead) {
  VectorOf<Math> even[Rows] = {}, odd[Rows] = {};
  int64_t k = 0;
  for (; k + 2 <= cols; k += 2) {
    const VectorOf<Math> first = vector(p.factor + k * p.rank);
    const VectorOf<Math> second = vector(p.factor + (k + 1) * p.rank);
    ahead.fetch(k);
    ahead.fetch(k + 1);
    for (int i = 0; i < Rows; ++i) {
      even[i] += x[i * stride + k] * first;
      odd[i] += x[i * stride + k + 1] * second;
    }
  }
  for (int i = 0; i < Rows && k < cols; ++i) {
    even[i] += x[i * stride + k] * vector(p.factor + k * p.rank);
  }
  for (int i = 0; i < Rows; ++i) vector(p.shrunk + i * p.rank) += even[i] + odd[i];
}

// Vectors of a wide rank worked on at a time, so that an x that was broadcast serves all of them.
constexpr int kWide = 3;

// Shrinks alone, a wide rank: there are enough sums for none to wait, and each strip has its own.
template <int Rows, typename Math>
LK_INLINE void wide_shrink_block(const Math* x, int64_t stride, int64_t cols,
                                 const Products<Math>& p, const Ahead& ahead) {
  VectorOf<Math> sums[Rows][kWide] = {};
  for (int64_t k = 0; k < cols; ++k) {
    VectorOf<Math> factor[kWide];
    for (int v = 0; v < kWide; ++v) factor[v] = vector(p.factor + k * p.rank + v * kLanes);
    ahead.fetch(k);
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < kWide; ++v) sums[i][v] += x[i * stride + k] * factor[v];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kWide; ++v) vector(p.shrunk + i * p.rank + v * kLanes) += sums[i][v];
  }
}

// Outer products alone, a wide rank.
template <int Rows, typename Math>
LK_INLINE void wide_outer_block(const Math* x, int64_t stride, int64_t cols,
                                const Products<Math>& p, const Ahead& ahead) {
  VectorOf<Math> vectors[Rows][kWide];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kWide; ++v) vectors[i][v] = vector(p.vectors + i * p.rank + v * kLanes);
  }
  for (int64_t k = 0; k < cols; ++k) {
    VectorOf<Math> outer[kWide];
    for (int v = 0; v < kWide; ++v) outer[v] = vector(p.outer + k * p.rank + v * kLanes);
    ahead.fetch(k);
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < kWide; ++v) outer[v] += x[i * stride + k] * vectors[i][v];
    }
    for (int v = 0; v < kWide; ++v) vector(p.outer + k * p.rank + v * kLanes) = outer[v];
  }
}

template <typename Math>
LK_INLINE void advance(Products<Math>& p, int64_t lanes) {
  if (p.shrunk) p.shrunk += lanes, p.factor += lanes;
  if (p.outer) p.vectors += lanes, p.outer += lanes;
}

template <int Rows, typename Math>
LK_INLINE void blocks(const Math* x, int64_t stride, int64_t cols, Products<Math> p,
                      const Ahead& ahead) {
  const int64_t lead = p.rank;
  int64_t r = 0;
  for (; r + kWide * kLanes <= lead && !(p.outer && p.shrunk); r += kWide * kLanes) {
    if (p.shrunk) {
      wide_shrink_block<Rows>(x, stride, cols, p, ahead);
    } else {
      wide_outer_block<Rows>(x, stride, cols, p, ahead);
    }
    advance(p, kWide * kLanes);
  }
  for (; r < lead; r += kLanes) {
    if (p.outer && p.shrunk) {
      block<Rows, true, true>(x, stride, cols, p, ahead);
    } else if (p.shrunk) {
      shrink_block<Rows>(x, stride, cols, p, ahead);
    } else {
      block<Rows, false, true>(x, stride, cols, p, ahead);
    }
    advance(p, kLanes);
  }
}

// Rows [0, count) of a strip of x as Math, dropped out: in place where that is what x holds.
template <typename Math>
LK_INLINE const Math* load(const Activation& x, int64_t row, Range cols, int count, Math* tile,
                           int64_t* stride) {
  const int64_t start = row * x.stride + cols.begin, width = cols.end - cols.begin;
  const bool wide = x.storage == Storage::kFloat || x.storage == Storage::kDouble;
  if (wide && !x.keep) {
    *stride = x.stride;
    return static_cast<const Math*>(x.data) + start;
  }
  *stride = kStrip;
  typed<Math>(x.data, x.storage, [&](const auto* from) {
    for (int i = 0; i < count; ++i) {
      const auto* source = from + start + i * x.stride;
      Math* to = tile + i * kStrip;
      if (!wide || !x.keep) {
        for (int64_t k = 0; k < width; ++k) to[k] = widen(source[k]);
      }
    }
  });
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

LK_INLINE Ahead after(const Activation& x, int64_t row, int64_t col, Range rows) {
  const int64_t element = bytes(x.storage), next = std::min(row + kRows, rows.end - 1);
  const auto* data = static_cast<const char*>(x.data) + (next * x.stride + col) * element;
  return {data, next + kRows <= rows.end ? x.stride * element : 0, element};
}

template <typename Math>
LK_INLINE void accumulate_strips(const Activation& x, Range rows, Range cols,
                                 const Products<Math>& p) {
  alignas(64) Math tile[kRows * kStrip];
  for (int64_t k = cols.begin; k < cols.end; k += kStrip) {
    const Range strip = {k, std::min(k + kStrip, cols.end)};
    const int64_t width = strip.end - strip.begin;
    int64_t m = rows.begin, stride;
    for (; m + kRows <= rows.end; m += kRows) {
      const Math* from = load(x, m, strip, kRows, tile, &stride);
      blocks<kRows>(from, stride, width, moved(p, m, k), after(x, m, k, rows));
    }
    for (; m < rows.end; ++m) {
      const Math* from = load(x, m, strip, 1, tile, &stride);
      blocks<1>(from, stride, width, moved(p, m, k), after(x, m, k, rows));
    }
  }
}

LK_SIMD void accumulate_f32(const Activation& x, Range rows, Range cols, const Products<float>& p) {
  accumulate_strips(x, rows, cols, p);
}

LK_SIMD void accumulate_f64(const Activation& x, Range rows, Range cols,
                            const Products<double>& p) {
  accumulate_strips(x, rows, cols, p);
}

// Rows [0, Rows) of one strip of vectors · factor, columns in whole vectors and then one by one.
template <int Rows, typename Math>
LK_INLINE void expand_block(const Expansion<Math>& e, int64_t row, Range cols, Math* tile) {
  const Math* vectors = e.vectors + row * e.vector_stride;
  const int64_t width = cols.end - cols.begin;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    VectorOf<Math> sums[Rows] = {};
    const Math* factor = e.factor + cols.begin + k;
    for (int64_t r = 0; r < e.rank; ++r) {
      const VectorOf<Math> f = vector(factor + r * e.factor_stride);
      for (int i = 0; i < Rows; ++i) sums[i] += vectors[i * e.vector_stride + r] * f;
    }
    for (int i = 0; i < Rows; ++i) vector(tile + i * kStrip + k) = sums[i];
  }
  for (; k < width; ++k) {
    for (int i = 0; i < Rows; ++i) {
      Math sum = 0;
      for (int64_t r = 0; r < e.rank; ++r) {
        sum += vectors[i * e.vector_stride + r] * e.factor[r * e.factor_stride + cols.begin + k];
      }
      tile[i * kStrip + k] = sum;
    }
  }
}

template <typename Math>
LK_INLINE void store(const Expansion<Math>& e, int64_t row, Range cols, Math* tile, int count) {
  const int64_t width = cols.end - cols.begin;
  for (int i = 0; i < count; ++i) {
    Math* line = tile + i * kStrip;
    if (e.keep) {
      const uint8_t* keep = e.keep + (row + i) * e.keep_stride + cols.begin / 8;
      drop_row(line, line, keep, width, e.scale);
    } else {
      for (int64_t k = 0; k < width; ++k) line[k] *= e.scale;
    }
    typed<Math>(e.out, e.storage, [&](const auto* base) {
      auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(base)>>*>(base) +
                 (row + i) * e.cols + cols.begin;
      if (e.add) {
        for (int64_t k = 0; k < width; ++k) narrow(to + k, widen(to[k]) + line[k]);
      } else {
        for (int64_t k = 0; k < width; ++k) narrow(to + k, line[k]);
      }
    });
  }
}

// Rows [0, Rows) of out = scale * vectors * factor from column k on, or += that, in registers from
// end to end.
template <int Rows, int Vectors, bool Add, typename Math>
LK_INLINE void direct_block(const Expansion<Math>& e, int64_t row, int64_t k) {
  VectorOf<Math> sums[Rows][Vectors] = {};
  const Math* vectors = e.vectors + row * e.vector_stride;
  const Math* factor = e.factor + k;
  for (int64_t r = 0; r < e.rank; ++r) {
    VectorOf<Math> f[Vectors];
    for (int v = 0; v < Vectors; ++v) f[v] = vector(factor + r * e.factor_stride + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      for (int v = 0; v < Vectors; ++v) sums[i][v] += vectors[i * e.vector_stride + r] * f[v];
    }
  }
  Math* out = static_cast<Math*>(e.out) + row * e.cols + k;
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      VectorOf<Math>& to = vector(out + i * e.cols + v * kLanes);
      to = Add ? to + sums[i][v] * e.scale : sums[i][v] * e.scale;
    }
  }
}

// The columns of `rows` that are whole vectors; returns where the rest begins.
template <bool Add, typename Math>
LK_INLINE int64_t direct_strips(const Expansion<Math>& e, Range rows) {
  const int64_t whole = e.cols / kLanes * kLanes;
  for (int64_t begin = 0; begin < whole; begin += kStrip) {
    const int64_t end = std::min(begin + kStrip, whole);
    int64_t m = rows.begin;
    for (; m + kRows <= rows.end; m += kRows) {
      int64_t k = begin;
      for (; k + 2 * kLanes <= end; k += 2 * kLanes) direct_block<kRows, 2, Add>(e, m, k);
      for (; k < end; k += kLanes) direct_block<kRows, 1, Add>(e, m, k);
    }
    for (; m < rows.end; ++m) {
      for (int64_t k = begin; k < end; k += kLanes) direct_block<1, 1, Add>(e, m, k);
    }
  }
  return whole;
}

template <typename Math>
LK_INLINE void expand_strips(const Expansion<Math>& e, Range rows) {
  alignas(64) Math tile[kRows * kStrip];
  const bool wide = e.storage == Storage::kFloat || e.storage == Storage::kDouble;
  const bool direct = wide && !e.keep;
  const int64_t first = !direct ? 0
                        : e.add ? direct_strips<true>(e, rows)
                                : direct_strips<false>(e, rows);
  for (int64_t k = first; k < e.cols; k += kStrip) {
    const Range strip = {k, std::min(k + kStrip, e.cols)};
    int64_t m = rows.begin;
    for (; m + kRows <= rows.end; m += kRows) {
      expand_block<kRows>(e, m, strip, tile);
      store(e, m, strip, tile, kRows);
    }
    for (; m < rows.end; ++m) {
      expand_block<1>(e, m, strip, tile);
      store(e, m, strip, tile, 1);
    }
  }
}

LK_SIMD void expand_f32(const Expansion<float>& e, Range rows) { expand_strips(e, rows); }

LK_SIMD void expand_f64(const Expansion<double>& e, Range rows) { expand_strips(e, rows); }

// How far ahead in a row of a weight is asked for.
constexpr int64_t kElementsAhead = 64;

// lanes += (w + vectors * factor)^2 for `Vectors` vectors from column k on, in registers.
template <int Rows, int Vectors, typename Math>
LK_INLINE void add_squares(const Expansion<Math>& e, int64_t row, int64_t k, const Math* w,
                           int64_t stride, VectorOf<Math>* lanes) {
  VectorOf<Math> sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      __builtin_prefetch(w + i * stride + v * kLanes + kElementsAhead);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) sums[i][v] = vector(w + i * stride + v * kLanes);
  }
  const Math* vectors = e.vectors + row * e.vector_stride;
  for (int64_t r = 0; r < e.rank; ++r) {
    const Math* factor = e.factor + r * e.factor_stride + k;
    const VectorOf<Math> first = vector(factor), last = vector(factor + (Vectors - 1) * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Math scalar = vectors[i * e.vector_stride + r];
      sums[i][0] += scalar * first;
      if (Vectors > 1) sums[i][Vectors - 1] += scalar * last;
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) lanes[i] += sums[i][v] * sums[i][v];
  }
}

// What a strip adds to the sum of each row: whole vectors in lanes, the rest one by one.
template <int Rows, typename Math>
LK_INLINE void norm_strip(const Expansion<Math>& e, int64_t row, Range cols, const Math* w,
                          int64_t stride, double* totals) {
  VectorOf<Math> lanes[Rows] = {};
  const int64_t width = cols.end - cols.begin;
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    add_squares<Rows, 2>(e, row, cols.begin + k, w + k, stride, lanes);
  }
  for (; k + kLanes <= width; k += kLanes) {
    add_squares<Rows, 1>(e, row, cols.begin + k, w + k, stride, lanes);
  }
  for (int i = 0; i < Rows; ++i) {
    for (int64_t lane = 0; lane < kLanes; ++lane) totals[i] += lanes[i][lane];
    const Math* vectors = e.vectors + (row + i) * e.vector_stride;
    for (int64_t c = k; c < width; ++c) {
      Math sum = w[i * stride + c];
      for (int64_t r = 0; r < e.rank; ++r) {
        sum += vectors[r] * e.factor[r * e.factor_stride + cols.begin + c];
      }
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
  for (; m + kRows <= rows.end; m += kRows) norm_block<kRows>(n, m);
  for (; m < rows.end; ++m) norm_block<1>(n, m);
}

LK_SIMD void norms_f32(const Norms<float>& n, Range rows) { norm_blocks(n, rows); }

LK_SIMD void norms_f64(const Norms<double>& n, Range rows) { norm_blocks(n, rows); }

// Sixteen by sixteen through a tile on the stack, so that a cache line is read and written once.
template <typename Math>
LK_INLINE void transpose_tiles(const Math* in, int64_t in_stride, Math* out, int64_t out_stride,
                               int64_t rows, Range cols) {
  alignas(64) Math tile[kLanes][kLanes];
  for (int64_t k = cols.begin; k < cols.end; k += kLanes) {
    const int64_t width = std::min(kLanes, cols.end - k);
    for (int64_t m = 0; m < rows; m += kLanes) {
      const int64_t height = std::min(kLanes, rows - m);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) tile[j][i] = in[(m + i) * in_stride + k + j];
      }
      for (int64_t j = 0; j < width; ++j) {
        std::memcpy(out + (k + j) * out_stride + m, tile[j], height * sizeof(Math));
      }
    }
  }
}

}  // namespace

void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows,
               Range cols) {
  transpose_tiles(in, in_stride, out, out_stride, rows, cols);
}

void transpose(const double* in, int64_t in_stride, double* out, int64_t out_stride, int64_t rows,
               Range cols) {
  transpose_tiles(in, in_stride, out, out_stride, rows, cols);
}

void accumulate(const Activation& x, Range rows, Range cols, const Products<float>& products) {
  accumulate_f32(x, rows, cols, products);
}

void accumulate(const Activation& x, Range rows, Range cols, const Products<double>& products) {
  accumulate_f64(x, rows, cols, products);
}

void norms(const Norms<float>& n, Range rows) { norms_f32(n, rows); }

void norms(const Norms<double>& n, Range rows) { norms_f64(n, rows); }

void expand(const Expansion<float>& expansion, Range rows) { expand_f32(expansion, rows); }

void expand(const Expansion<double>& expansion, Range rows) { expand_f64(expansion, rows); }

}  // namespace lora_kernels
