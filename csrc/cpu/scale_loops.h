// The loops of scale_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

template <typename Math>
LK_INLINE void read(Math* to, const Matrix& from, int64_t row, int64_t col, int64_t count) {
  typed<Math>(from.data, from.storage, [&](const auto* base) LK_LAMBDA {
    widen_row(to, base + row * from.stride + col, count);
  });
}

template <typename Math>
LK_INLINE void write(const Matrix& to, int64_t row, int64_t col, int64_t count, const Math* from) {
  typed<Math>(to.data, to.storage, [&](const auto* base) LK_LAMBDA {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(base)>>;
    narrow_row(const_cast<Element*>(base) + row * to.stride + col, from, count);
  });
}

// Elements of a row as what they are summed in: where they lie, or as a copy in `tile`.
template <typename Math>
LK_INLINE const Math* elements(const Matrix& from, int64_t row, int64_t col, int64_t count,
                               Math* tile) {
  if (stored_as<Math>(from.storage)) {
    return static_cast<const Math*>(from.data) + row * from.stride + col;
  }
  read(tile, from, row, col, count);
  return tile;
}

// The vector from element k on, and element k alone. (A deduced type would forget that a vector may
// be anywhere.)
struct VectorAt {
  int64_t k;
  template <typename Math>
  LK_INLINE VectorOf<Math>& operator()(Math* p) const {
    return vector(p + k);
  }
  template <typename Math>
  LK_INLINE const VectorOf<Math>& operator()(const Math* p) const {
    return vector(p + k);
  }
};

struct ElementAt {
  int64_t k;
  template <typename Math>
  LK_INLINE Math& operator()(Math* p) const {
    return p[k];
  }
};

// Calls each(at) for every vector of `count` elements, and then for every element that is left.
template <typename Math, typename Each>
LK_INLINE void over(int64_t count, Each each) {
  int64_t k = 0;
  for (; k + kWidth<Math> <= count; k += kWidth<Math>) each(VectorAt{k});
  for (; k < count; ++k) each(ElementAt{k});
}

// Where part of a row is made: in its place, or in `tile`, to be written from there.
template <typename Math>
LK_INLINE Math* place(const Matrix& to, int64_t row, int64_t col, Math* tile) {
  if (!stored_as<Math>(to.storage)) return tile;
  return static_cast<Math*>(to.data) + row * to.stride + col;
}

// Asks for part of a row that is read soon: the hardware's own prefetching does not follow a strip
// from one row to the next.
LK_INLINE void ask(const Matrix& from, int64_t row, int64_t col, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t element = bytes(from.storage);
  const char* data = static_cast<const char*>(from.data) + (row * from.stride + col) * element;
  for (int64_t k = 0; k < count * element; k += kLine) __builtin_prefetch(data + k);
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
LK_INLINE void scale_strips(const Scaling<Math>& p, Range rows, int64_t cols) {
  alignas(64) Math line[kStrip], sum[kStrip];
  const Math none[kStrip] = {};
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    const Math* z = elements(p.z, m, col, width, line);
    const Math* c = p.scale + col;
    const Math* b = p.bias ? p.bias + col : none;
    Math* y = place(p.y, m, col, sum);
    if (p.accumulate) {
      elements(p.y, m, col, width, sum);
      over<Math>(width, [&](auto at) LK_LAMBDA { at(y) += at(z) * at(c) + at(b); });
    } else {
      over<Math>(width, [&](auto at) LK_LAMBDA { at(y) = at(z) * at(c) + at(b); });
    }
    if (y == sum) write(p.y, m, col, width, sum);
  });
}

// Rows between the one that is asked for and the one that is read.
constexpr int64_t kAhead = 8;
// Rows whose products are summed by themselves first: a long sum in float32 would lose digits.
constexpr int64_t kSumRows = 32;

template <typename Math>
LK_INLINE void unscale_rows(const Unscaling<Math>& p, Range rows, int64_t col, int64_t width) {
  alignas(64) Math line[kStrip], other[kStrip], sums[kStrip] = {};
  const Math* factor = p.factor + col;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    ask(p.dy, m + kAhead, col, width);
    const Math* dy = elements(p.dy, m, col, width, line);
    if (p.sums) {
      ask(p.z, m + kAhead, col, width);
      const Math* z = elements(p.z, m, col, width, other);
      over<Math>(width, [&](auto at) LK_LAMBDA { at(sums) += at(dy) * at(z); });
    }
    if (p.scaled.data) {
      Math* out = place(p.scaled, m, col, other);
      over<Math>(width, [&](auto at) LK_LAMBDA { at(out) = at(dy) * at(factor); });
      if (out == other) write(p.scaled, m, col, width, other);
    }
  }
  for (int64_t k = 0; k < width && p.sums; ++k) p.sums[col + k] += sums[k];
}

template <typename Math>
LK_INLINE void unscale_strips(const Unscaling<Math>& p, Range rows, Range cols) {
  for (int64_t col = cols.begin; col < cols.end; col += kStrip) {
    for (int64_t m = rows.begin; m < rows.end; m += kSumRows) {
      const Range block = {m, std::min(m + kSumRows, rows.end)};
      unscale_rows(p, block, col, std::min(kStrip, cols.end - col));
    }
  }
}

template <typename Math>
LK_INLINE void split_strips(const Splitting& p, Range rows, int64_t cols) {
  alignas(64) Math x[kStrip], kept[kStrip];
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    read(x, p.x, m, col, width);
    const uint8_t* bits = p.keep.bits + m * p.keep.stride + col / 8;
    drop_row(kept, x, bits, width, static_cast<Math>(p.keep.scale));
    write(p.dropped, m, col, width, kept);
    over<Math>(width, [&](auto at) LK_LAMBDA { at(x) -= at(kept); });
    write(p.rest, m, col, width, x);
  });
}

template <typename Math>
LK_INLINE void keep_strips(const Keeping& p, Range rows, int64_t cols) {
  alignas(64) Math x[kStrip], sum[kStrip];
  strips(rows, {0, cols}, [&](int64_t m, int64_t col, int64_t width) LK_LAMBDA {
    read(x, p.x, m, col, width);
    read(sum, p.sum, m, col, width);
    drop_row(x, x, p.keep.bits + m * p.keep.stride + col / 8, width, Math(1));
    over<Math>(width, [&](auto at) LK_LAMBDA { at(sum) += at(x); });
    write(p.sum, m, col, width, sum);
  });
}

}  // namespace

LK_LOOP void run(const Scaling<float>& p, Range rows, int64_t cols) { scale_strips(p, rows, cols); }

LK_LOOP void run(const Scaling<double>& p, Range rows, int64_t cols) {
  scale_strips(p, rows, cols);
}

LK_LOOP void run(const Unscaling<float>& p, Range rows, Range cols) {
  unscale_strips(p, rows, cols);
}

LK_LOOP void run(const Unscaling<double>& p, Range rows, Range cols) {
  unscale_strips(p, rows, cols);
}

LK_LOOP void split_f32(const Splitting& p, Range rows, int64_t cols) {
  split_strips<float>(p, rows, cols);
}

LK_LOOP void split_f64(const Splitting& p, Range rows, int64_t cols) {
  split_strips<double>(p, rows, cols);
}

LK_LOOP void keep_f32(const Keeping& p, Range rows, int64_t cols) {
  keep_strips<float>(p, rows, cols);
}

LK_LOOP void keep_f64(const Keeping& p, Range rows, int64_t cols) {
  keep_strips<double>(p, rows, cols);
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
