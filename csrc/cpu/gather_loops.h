// The loops of gather_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

// Columns at a time: four rows and four pages of them stay in L1.
constexpr int64_t kSpan = 1024;

// sums[i][j] += x_i . page_j over `cols` columns, lane by lane and then the lanes in a tree.
template <int R, int P, typename Math, typename Stored>
LK_INLINE void dot_tile(const Math* const* x, const Stored* const* page, int64_t cols,
                        Math (*sums)[P]) {
  VectorOf<Math> lanes[R][P] = {};
  int64_t k = 0;
  for (; k + kWidth<Math> <= cols; k += kWidth<Math>) {
    VectorOf<Math> columns[P];
    for (int j = 0; j < P; ++j) read_vector(columns[j], page[j] + k);
    for (int i = 0; i < R; ++i) {
      const VectorOf<Math> row = vector(x[i] + k);
      for (int j = 0; j < P; ++j) lanes[i][j] += row * columns[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) {
      Math rest = 0;
      for (int64_t tail = k; tail < cols; ++tail) {
        rest += x[i][tail] * static_cast<Math>(widen(page[j][tail]));
      }
      sums[i][j] += sum_of_lanes<Math>(lanes[i][j]) + rest;
    }
  }
}

// out_j[0, cols) += sum_i factor[j][i] in_i[0, cols), i in order; every lane of a factor is the
// same.
template <int J, int I, typename Math, typename Stored>
LK_INLINE void mix_tile(Math* const* out, const Stored* const* in,
                        const VectorOf<Math> (*factor)[I], int64_t cols) {
  int64_t k = 0;
  for (; k + kWidth<Math> <= cols; k += kWidth<Math>) {
    VectorOf<Math> columns[I];
    for (int i = 0; i < I; ++i) read_vector(columns[i], in[i] + k);
    for (int j = 0; j < J; ++j) {
      VectorOf<Math> sum = vector(out[j] + k);
      for (int i = 0; i < I; ++i) sum += factor[j][i] * columns[i];
      vector(out[j] + k) = sum;
    }
  }
  for (; k < cols; ++k) {
    for (int j = 0; j < J; ++j) {
      Math sum = out[j][k];
      for (int i = 0; i < I; ++i) sum += factor[j][i][0] * static_cast<Math>(widen(in[i][k]));
      out[j][k] = sum;
    }
  }
}

// Rows, or slots, that are worked on together: as many as there are registers for their sums.
constexpr int kTall = kManyRegisters ? kTile : kTile / 2;

// A whole tile, or one at a time of what is left: each sum is the same either way.
template <int Tile>
LK_INLINE int64_t tile_of(int64_t left) {
  return left >= Tile ? Tile : 1;
}

// Calls run with two counts, kTall or 1 and kTile or 1, as constants.
template <typename Run>
LK_INLINE void with_counts(int64_t tall, int64_t wide, Run run) {
  using One = std::integral_constant<int, 1>;
  using Tall = std::integral_constant<int, kTall>;
  using Wide = std::integral_constant<int, kTile>;
  if (tall == 1 && wide == 1) return run(One{}, One{});
  if (tall == 1) return run(One{}, Wide{});
  if (wide == 1) return run(Tall{}, One{});
  return run(Tall{}, Wide{});
}

// A division takes as long as a few hundred products, and most batches have a slot a row.
template <typename Math>
LK_INLINE int64_t row_number(const Rows<Math>& rows, int64_t i) {
  return rows.slots_per_row == 1 ? rows.slots[i] : rows.slots[i] / rows.slots_per_row;
}

template <typename Math>
LK_INLINE const Math* row_of(const Rows<Math>& rows, int64_t i) {
  return rows.data + row_number(rows, i) * rows.stride;
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
  // A few rows with all pages: rows come from far away, and the pages stay near.
  for (int64_t m = 0, height; m < rows.count; m += height) {
    height = tile_of<kTall>(rows.count - m);
    for (int64_t r = first, depth; r < last; r += depth) {
      depth = tile_of<kTile>(last - r);
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
  VectorOf<Math> factor[J][I];
  for (int j = 0; j < J; ++j) out[j] = out_at(j);
  for (int i = 0; i < I; ++i) in[i] = in_at(i);
  for (int j = 0; j < J; ++j) {
    for (int i = 0; i < I; ++i) factor[j][i] = factor_at(j, i) + VectorOf<Math>{};
  }
  mix_tile<J, I, Math>(out, in, factor, width);
}

// out(j) = sum over r of vectors[slot m + j, r] page r, for the `height` slots from m on.
template <typename Math, typename Stored, typename Out>
LK_INLINE void mix_slots(const Rows<Math>& slots, int64_t m, int64_t height, const Pages& pages,
                         const Stored* data, const Mix<Math>& mix, Columns columns, Out out) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t j = 0; j < height; ++j) std::fill(out(j), out(j) + width, Math(0));
  for (int64_t r = 0, depth; r < mix.rank; r += depth) {
    depth = tile_of<kTile>(mix.rank - r);
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
    height = tile_of<kTall>(slots.count - m);
    const auto out = [&](int64_t j) LK_LAMBDA {
      return mix.out + slots.slots[m + j] * mix.out_stride + columns.begin;
    };
    mix_slots(slots, m, height, pages, data, mix, columns, out);
  }
}

template <typename Math>
constexpr Storage kStorageOf = sizeof(Math) == 8 ? Storage::kDouble : Storage::kFloat;

// Elements of pages that are copied side by side, where they do not push each other out of the
// cache.
constexpr int64_t kStaged = 4096;

// to_j[0, cols) += sum over r of factor_j[r] page(r), summed in order and added once; `cols` are
// whole vectors, since of single elements a compiler may round the products of one loop and not of
// another.
template <int J, typename Math, typename Page>
LK_INLINE void add_sums(Math* const* to, const Math* const* factor, Page page, int64_t rank,
                        int64_t cols) {
  for (int64_t k = 0; k < cols; k += kWidth<Math>) {
    VectorOf<Math> sum[J] = {};
    for (int64_t r = 0; r < rank; ++r) {
      VectorOf<Math> column;
      read_vector(column, page(r) + k);
      for (int j = 0; j < J; ++j) sum[j] += factor[j][r] * column;
    }
    for (int j = 0; j < J; ++j) vector(to[j] + k) += sum[j];
  }
}

// mix_add() into a target of the type that is summed in.
template <typename Math, typename Page>
LK_INLINE void mix_add_pages(const Rows<Math>& slots, Page page, const Mix<Math>& mix,
                             Columns columns, Math* to, int64_t stride) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t m = 0, height; m < slots.count; m += height) {
    height = tile_of<kTall>(slots.count - m);
    Math* out[kTall];
    const Math* factor[kTall];
    for (int64_t j = 0; j < height; ++j) {
      const int64_t slot = slots.slots[m + j];
      out[j] = to + row_number(slots, m + j) * stride + columns.begin;
      factor[j] = mix.vectors + slot * mix.vector_stride;
    }
    if (height == 1) {
      add_sums<1>(out, factor, page, mix.rank, width);
    } else {
      add_sums<kTall>(out, factor, page, mix.rank, width);
    }
  }
}

// The same, the pages side by side where there are rows enough for the copy.
template <typename Math, typename Stored>
LK_INLINE void mix_add_direct(const Rows<Math>& slots, const Pages& pages, const Stored* data,
                              const Mix<Math>& mix, Columns columns, Math* to, int64_t stride) {
  const int64_t width = columns.end - columns.begin;
  const auto page = [&](int64_t r)
                        LK_LAMBDA { return data + pages.index[r] * pages.stride + columns.begin; };
  if (slots.count <= kTile) return mix_add_pages(slots, page, mix, columns, to, stride);
  alignas(64) Math staged[kStaged];
  for (int64_t r = 0; r < mix.rank; ++r) {
    for (int64_t k = 0; k < width; ++k) staged[r * width + k] = widen(page(r)[k]);
  }
  const auto side_by_side = [&](int64_t r) LK_LAMBDA { return staged + r * width; };
  mix_add_pages(slots, side_by_side, mix, columns, to, stride);
}

template <typename Math, typename Stored>
LK_INLINE void add_to(Stored* to, const Math* from, int64_t width) {
  int64_t k = 0;
  if constexpr (sizeof(Stored) == sizeof(Math)) {
    for (; k + kWidth<Math> <= width; k += kWidth<Math>) vector(to + k) += vector(from + k);
  }
  for (; k < width; ++k) narrow(to + k, static_cast<Math>(widen(to[k])) + from[k]);
}

template <typename Math, typename Stored>
LK_INLINE void mix_add_typed(const Rows<Math>& slots, const Pages& pages, const Stored* data,
                             const Mix<Math>& mix, Columns columns, const Target& to) {
  if (to.storage == kStorageOf<Math> && mix.rank * (columns.end - columns.begin) <= kStaged) {
    const int64_t rest = (columns.end - columns.begin) % kWidth<Math>;
    const Columns whole = {columns.begin, columns.end - rest};
    mix_add_direct(slots, pages, data, mix, whole, static_cast<Math*>(to.data), to.stride);
    columns.begin = whole.end;
  }
  const int64_t width = columns.end - columns.begin;
  for (int64_t m = 0, height; width > 0 && m < slots.count; m += height) {
    height = tile_of<kTall>(slots.count - m);
    const auto out = [&](int64_t j) LK_LAMBDA { return mix.out + j * width; };
    mix_slots(slots, m, height, pages, data, mix, columns, out);
    typed<Math>(to.data, to.storage, [&](const auto* base) LK_LAMBDA {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(base)>>;
      for (int64_t j = 0; j < height; ++j) {
        const int64_t row = row_number(slots, m + j);
        add_to(const_cast<Element*>(base) + row * to.stride + columns.begin, out(j), width);
      }
    });
  }
}

// outer_pages() for pages that lie side by side in `sums`: a few rows into all of them, since rows
// come from far away.
template <typename Math, typename Sums>
LK_INLINE void outer_block(const Rows<Math>& rows, int64_t first, int64_t last,
                           const Mix<Math>& mix, Columns columns, Sums sums) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t r = first; r < last; ++r) std::fill(sums(r), sums(r) + width, Math(0));
  for (int64_t m = 0, depth; m < rows.count; m += depth) {
    depth = tile_of<kTile>(rows.count - m);
    const auto in = [&](int64_t i) LK_LAMBDA { return row_of(rows, m + i) + columns.begin; };
    for (int64_t r = first, height; r < last; r += height) {
      height = tile_of<kTall>(last - r);
      const auto out = [&](int64_t j) LK_LAMBDA { return sums(r + j); };
      const auto factor = [&](int64_t j, int64_t i) LK_LAMBDA {
        return mix.vectors[rows.slots[m + i] * mix.vector_stride + r + j];
      };
      with_counts(height, depth, [&](auto h, auto d) LK_LAMBDA {
        mix_block<decltype(h)::value, decltype(d)::value, Math, Math>(out, in, factor, width);
      });
    }
  }
}

template <typename Math>
LK_INLINE void outer_typed(const Rows<Math>& rows, const int32_t* index, int64_t first,
                           int64_t last, const Mix<Math>& mix, Columns columns) {
  alignas(64) Math staged[kStaged];
  const int64_t span = std::max<int64_t>(kStaged / (last - first) / 64 * 64, 64);
  for (int64_t begin = columns.begin; begin < columns.end; begin += span) {
    const Columns part = {begin, std::min(begin + span, columns.end)};
    const auto page = [&](int64_t r)
                          LK_LAMBDA { return mix.out + index[r] * mix.out_stride + part.begin; };
    if ((last - first) * span > kStaged) {
      outer_block(rows, first, last, mix, part, page);
      continue;
    }
    const auto sums = [&](int64_t r) LK_LAMBDA { return staged + (r - first) * span; };
    outer_block(rows, first, last, mix, part, sums);
    for (int64_t r = first; r < last; ++r) {
      std::copy(sums(r), sums(r) + (part.end - part.begin), page(r));
    }
  }
}

// out[r * width + n] = from[n * stride + r], for squares as wide as a vector and then the edges.
template <typename Math, typename Stored>
LK_INLINE void turn_typed(const Stored* from, int64_t stride, int64_t rank, int64_t width,
                          Math* out) {
  constexpr int64_t kSquare = kWidth<Math>;
  const int64_t high = rank / kSquare * kSquare, wide = width / kSquare * kSquare;
  for (int64_t n = 0; n < wide; n += kSquare) {
    for (int64_t r = 0; r < high; r += kSquare) {
      VectorOf<Math> rows[kSquare];
      for (int i = 0; i < kSquare; ++i) read_vector(rows[i], from + (n + i) * stride + r);
      transpose_rows<Math>(rows);
      for (int i = 0; i < kSquare; ++i) vector(out + (r + i) * width + n) = rows[i];
    }
  }
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t n = r < high ? wide : 0; n < width; ++n) {
      out[r * width + n] = widen(from[n * stride + r]);
    }
  }
}

}  // namespace

LK_LOOP void dots(const Rows<float>& rows, const Pages& pages, int64_t first, int64_t last,
                  float* out, int64_t out_stride) {
  typed<float>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    dots_typed(rows, pages, data, first, last, out, out_stride);
  });
}

LK_LOOP void dots(const Rows<double>& rows, const Pages& pages, int64_t first, int64_t last,
                  double* out, int64_t out_stride) {
  typed<double>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    dots_typed(rows, pages, data, first, last, out, out_stride);
  });
}

LK_LOOP void mix(const Rows<float>& slots, const Pages& pages, const Mix<float>& what,
                 Columns columns) {
  typed<float>(pages.data, pages.storage,
               [&](const auto* data) LK_LAMBDA { mix_typed(slots, pages, data, what, columns); });
}

LK_LOOP void mix(const Rows<double>& slots, const Pages& pages, const Mix<double>& what,
                 Columns columns) {
  typed<double>(pages.data, pages.storage,
                [&](const auto* data) LK_LAMBDA { mix_typed(slots, pages, data, what, columns); });
}

LK_LOOP void mix_add(const Rows<float>& slots, const Pages& pages, const Mix<float>& what,
                     Columns columns, const Target& to) {
  typed<float>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    mix_add_typed(slots, pages, data, what, columns, to);
  });
}

LK_LOOP void mix_add(const Rows<double>& slots, const Pages& pages, const Mix<double>& what,
                     Columns columns, const Target& to) {
  typed<double>(pages.data, pages.storage, [&](const auto* data) LK_LAMBDA {
    mix_add_typed(slots, pages, data, what, columns, to);
  });
}

LK_LOOP void outer_pages(const Rows<float>& rows, const int32_t* index, int64_t first, int64_t last,
                         const Mix<float>& what, Columns columns) {
  outer_typed(rows, index, first, last, what, columns);
}

LK_LOOP void outer_pages(const Rows<double>& rows, const int32_t* index, int64_t first,
                         int64_t last, const Mix<double>& what, Columns columns) {
  outer_typed(rows, index, first, last, what, columns);
}

LK_LOOP void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
                  float* out) {
  typed<float>(from, storage,
               [&](const auto* data) LK_LAMBDA { turn_typed(data, stride, rank, width, out); });
}

LK_LOOP void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
                  double* out) {
  typed<double>(from, storage,
                [&](const auto* data) LK_LAMBDA { turn_typed(data, stride, rank, width, out); });
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
