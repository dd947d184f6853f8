#include "gather_pass.h"

#include <algorithm>
#include <type_traits>

namespace lora_kernels {
namespace {

// Columns at a time: four rows and four pages of them stay in L1.
constexpr int64_t kSpan = 1024;

template <typename Math, typename Stored>
LK_INLINE void load(VectorOf<Math>& wide, const Stored* from) {
  if constexpr (sizeof(Stored) == sizeof(Math)) {
    wide = vector(from);
  } else {
    for (int i = 0; i < kLanes; ++i) wide[i] = widen(from[i]);
  }
}

// sums[i][j] += x_i . page_j over `cols` columns, lane by lane and then the lanes in a tree.
template <int R, int P, typename Math, typename Stored>
LK_INLINE void dot_tile(const Math* const* x, const Stored* const* page, int64_t cols,
                        Math (*sums)[P]) {
  VectorOf<Math> lanes[R][P] = {};
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) {
    VectorOf<Math> columns[P];
    for (int j = 0; j < P; ++j) load<Math>(columns[j], page[j] + k);
    for (int i = 0; i < R; ++i) {
      const VectorOf<Math> row = vector(x[i] + k);
      for (int j = 0; j < P; ++j) lanes[i][j] += row * columns[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) {
      Math part[kLanes];
      vector(part) = lanes[i][j];
      for (int64_t tail = k; tail < cols; ++tail) {
        part[tail - k] += x[i][tail] * static_cast<Math>(widen(page[j][tail]));
      }
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
      }
      sums[i][j] += part[0];
    }
  }
}

// out_j[0, cols) += sum_i factor[j][i] in_i[0, cols), i in order.
template <int J, int I, typename Math, typename Stored>
LK_INLINE void mix_tile(Math* const* out, const Stored* const* in, const Math (*factor)[I],
                        int64_t cols) {
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) {
    VectorOf<Math> columns[I];
    for (int i = 0; i < I; ++i) load<Math>(columns[i], in[i] + k);
    for (int j = 0; j < J; ++j) {
      VectorOf<Math> sum = vector(out[j] + k);
      for (int i = 0; i < I; ++i) sum += factor[j][i] * columns[i];
      vector(out[j] + k) = sum;
    }
  }
  for (; k < cols; ++k) {
    for (int j = 0; j < J; ++j) {
      Math sum = out[j][k];
      for (int i = 0; i < I; ++i) sum += factor[j][i] * static_cast<Math>(widen(in[i][k]));
      out[j][k] = sum;
    }
  }
}

// A whole tile, or one at a time of what is left: each sum is the same either way.
LK_INLINE int64_t tile_of(int64_t left) { return left >= kTile ? kTile : 1; }

// Calls run with two counts, each kTile or 1, as constants.
template <typename Run>
LK_INLINE void with_counts(int64_t a, int64_t b, Run run) {
  using One = std::integral_constant<int, 1>;
  using Tile = std::integral_constant<int, kTile>;
  if (a == 1 && b == 1) return run(One{}, One{});
  if (a == 1) return run(One{}, Tile{});
  if (b == 1) return run(Tile{}, One{});
  return run(Tile{}, Tile{});
}

template <typename Math>
LK_INLINE const Math* row_of(const Rows<Math>& rows, int64_t i) {
  return rows.data + rows.slots[i] / rows.slots_per_row * rows.stride;
}

template <int R, int P, typename Math, typename Stored>
LK_INLINE void dots_block(const Rows<Math>& rows, int64_t m, const Pages& pages, const Stored* data,
                          int64_t r, Math* out, int64_t out_stride) {
  Math sums[R][P] = {};
  for (int64_t k = 0; k < pages.cols; k += kSpan) {
    const Math* x[R];
    const Stored* page[P];
    for (int i = 0; i < R; ++i) x[i] = row_of(rows, m + i) + k;
    for (int j = 0; j < P; ++j) page[j] = data + pages.index[r + j] * pages.stride + k;
    dot_tile<R, P>(x, page, std::min(kSpan, pages.cols - k), sums);
  }
  for (int i = 0; i < R; ++i) {
    std::copy(sums[i], sums[i] + P, out + rows.slots[m + i] * out_stride + r);
  }
}

template <typename Math, typename Stored>
LK_INLINE void dots_typed(const Rows<Math>& rows, const Pages& pages, const Stored* data,
                          int64_t first, int64_t last, Math* out, int64_t out_stride) {
  for (int64_t r = first, depth; r < last; r += depth) {
    depth = tile_of(last - r);
    for (int64_t m = 0, height; m < rows.count; m += height) {
      height = tile_of(rows.count - m);
      with_counts(height, depth, [&](auto h, auto d) LK_LAMBDA {
        dots_block<decltype(h)::value, decltype(d)::value>(rows, m, pages, data, r, out,
                                                           out_stride);
      });
    }
  }
}

// The two products that add multiples of whole rows differ in what is read and what is written.
template <int J, int I, typename Math, typename Stored, typename Out, typename In, typename Factor>
LK_INLINE void mix_block(Out out_at, In in_at, Factor factor_at, int64_t width) {
  Math* out[J];
  const Stored* in[I];
  Math factor[J][I];
  for (int j = 0; j < J; ++j) out[j] = out_at(j);
  for (int i = 0; i < I; ++i) in[i] = in_at(i);
  for (int j = 0; j < J; ++j) {
    for (int i = 0; i < I; ++i) factor[j][i] = factor_at(j, i);
  }
  mix_tile<J, I>(out, in, factor, width);
}

// out(j) = sum over r of vectors[slot m + j, r] page r, for the `height` slots from m on.
template <typename Math, typename Stored, typename Out>
LK_INLINE void mix_slots(const Rows<Math>& slots, int64_t m, int64_t height, const Pages& pages,
                         const Stored* data, const Mix<Math>& mix, Columns columns, Out out) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t j = 0; j < height; ++j) std::fill(out(j), out(j) + width, Math(0));
  for (int64_t r = 0, depth; r < mix.rank; r += depth) {
    depth = tile_of(mix.rank - r);
    const auto in = [&](int64_t i) LK_LAMBDA {
      return data + pages.index[r + i] * pages.stride + columns.begin;
    };
    const auto factor = [&](int64_t j, int64_t i) LK_LAMBDA {
      return mix.vectors[slots.slots[m + j] * mix.vector_stride + r + i];
    };
    with_counts(height, depth, [&](auto h, auto d) LK_LAMBDA {
      mix_block<decltype(h)::value, decltype(d)::value, Math, Stored>(out, in, factor, width);
    });
  }
}

template <typename Math, typename Stored>
LK_INLINE void mix_typed(const Rows<Math>& slots, const Pages& pages, const Stored* data,
                         const Mix<Math>& mix, Columns columns) {
  for (int64_t m = 0, height; m < slots.count; m += height) {
    height = tile_of(slots.count - m);
    const auto out = [&](int64_t j) LK_LAMBDA {
      return mix.out + slots.slots[m + j] * mix.out_stride + columns.begin;
    };
    mix_slots(slots, m, height, pages, data, mix, columns, out);
  }
}

template <typename Math, typename Stored>
LK_INLINE void add_to(Stored* to, const Math* from, int64_t width) {
  int64_t k = 0;
  if constexpr (sizeof(Stored) == sizeof(Math)) {
    for (; k + kLanes <= width; k += kLanes) vector(to + k) += vector(from + k);
  }
  for (; k < width; ++k) narrow(to + k, static_cast<Math>(widen(to[k])) + from[k]);
}

template <typename Math, typename Stored>
LK_INLINE void mix_add_typed(const Rows<Math>& slots, const Pages& pages, const Stored* data,
                             const Mix<Math>& mix, Columns columns, const Target& to) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t m = 0, height; m < slots.count; m += height) {
    height = tile_of(slots.count - m);
    const auto out = [&](int64_t j) LK_LAMBDA { return mix.out + j * width; };
    mix_slots(slots, m, height, pages, data, mix, columns, out);
    typed<Math>(to.data, to.storage, [&](const auto* base) LK_LAMBDA {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(base)>>;
      for (int64_t j = 0; j < height; ++j) {
        const int64_t row = slots.slots[m + j] / slots.slots_per_row;
        add_to(const_cast<Element*>(base) + row * to.stride + columns.begin, out(j), width);
      }
    });
  }
}

template <typename Math>
LK_INLINE void outer_typed(const Rows<Math>& rows, const int32_t* index, int64_t first,
                           int64_t last, const Mix<Math>& mix, Columns columns) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t r = first, height; r < last; r += height) {
    height = tile_of(last - r);
    const auto out = [&](int64_t j) LK_LAMBDA {
      return mix.out + index[r + j] * mix.out_stride + columns.begin;
    };
    for (int64_t j = 0; j < height; ++j) std::fill(out(j), out(j) + width, Math(0));
    for (int64_t m = 0, depth; m < rows.count; m += depth) {
      depth = tile_of(rows.count - m);
      const auto in = [&](int64_t i) LK_LAMBDA { return row_of(rows, m + i) + columns.begin; };
      const auto factor = [&](int64_t j, int64_t i) LK_LAMBDA {
        return mix.vectors[rows.slots[m + i] * mix.vector_stride + r + j];
      };
      with_counts(height, depth, [&](auto h, auto d) LK_LAMBDA {
        mix_block<decltype(h)::value, decltype(d)::value, Math, Math>(out, in, factor, width);
      });
    }
  }
}

LK_SIMD void dots_f32(const Rows<float>& rows, const Pages& pages, int64_t first, int64_t last,
                      float* out, int64_t out_stride) {
  typed<float>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    dots_typed(rows, pages, data, first, last, out, out_stride);
  });
}

LK_SIMD void dots_f64(const Rows<double>& rows, const Pages& pages, int64_t first, int64_t last,
                      double* out, int64_t out_stride) {
  dots_typed(rows, pages, static_cast<const double*>(pages.data), first, last, out, out_stride);
}

LK_SIMD void mix_f32(const Rows<float>& slots, const Pages& pages, const Mix<float>& mix,
                     Columns columns) {
  typed<float>(pages.data, pages.storage,
               [&](const auto* data) LK_LAMBDA { mix_typed(slots, pages, data, mix, columns); });
}

LK_SIMD void mix_f64(const Rows<double>& slots, const Pages& pages, const Mix<double>& mix,
                     Columns columns) {
  mix_typed(slots, pages, static_cast<const double*>(pages.data), mix, columns);
}

LK_SIMD void mix_add_f32(const Rows<float>& slots, const Pages& pages, const Mix<float>& mix,
                         Columns columns, const Target& to) {
  typed<float>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    mix_add_typed(slots, pages, data, mix, columns, to);
  });
}

LK_SIMD void mix_add_f64(const Rows<double>& slots, const Pages& pages, const Mix<double>& mix,
                         Columns columns, const Target& to) {
  mix_add_typed(slots, pages, static_cast<const double*>(pages.data), mix, columns, to);
}

LK_SIMD void outer_f32(const Rows<float>& rows, const int32_t* index, int64_t first, int64_t last,
                       const Mix<float>& mix, Columns columns) {
  outer_typed(rows, index, first, last, mix, columns);
}

LK_SIMD void outer_f64(const Rows<double>& rows, const int32_t* index, int64_t first, int64_t last,
                       const Mix<double>& mix, Columns columns) {
  outer_typed(rows, index, first, last, mix, columns);
}

}  // namespace

void dots(const Rows<float>& rows, const Pages& pages, int64_t first, int64_t last, float* out,
          int64_t out_stride) {
  dots_f32(rows, pages, first, last, out, out_stride);
}

void dots(const Rows<double>& rows, const Pages& pages, int64_t first, int64_t last, double* out,
          int64_t out_stride) {
  dots_f64(rows, pages, first, last, out, out_stride);
}

void mix(const Rows<float>& slots, const Pages& pages, const Mix<float>& what, Columns columns) {
  mix_f32(slots, pages, what, columns);
}

void mix(const Rows<double>& slots, const Pages& pages, const Mix<double>& what, Columns columns) {
  mix_f64(slots, pages, what, columns);
}

void mix_add(const Rows<float>& slots, const Pages& pages, const Mix<float>& what, Columns columns,
             const Target& to) {
  mix_add_f32(slots, pages, what, columns, to);
}

void mix_add(const Rows<double>& slots, const Pages& pages, const Mix<double>& what,
             Columns columns, const Target& to) {
  mix_add_f64(slots, pages, what, columns, to);
}

void outer_pages(const Rows<float>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<float>& what, Columns columns) {
  outer_f32(rows, index, first, last, what, columns);
}

void outer_pages(const Rows<double>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<double>& what, Columns columns) {
  outer_f64(rows, index, first, last, what, columns);
}

}  // namespace lora_kernels
