// The loops of dropped_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

using Vector = VectorOf<float>;
constexpr int kOne = kWidth<float>;

// Vectors of a panel's columns that are worked on together, and how many sums each of them has:
// with few vectors each multiplication would wait for the one before.
constexpr int kGroup = std::min<int>(kPanel / kOne, kManyRegisters ? 16 : 8);
constexpr int kSums = kGroup < 8 ? 2 : 1;

// line -= the elements' values times their rows of the panel [kChunk, kPanel], for a group of
// vectors.
LK_INLINE void subtract_row(const DroppedList& list, int64_t begin, int64_t end, const float* panel,
                            float* line) {
  Vector sums[kSums][kGroup] = {};
  for (int v = 0; v < kGroup; ++v) sums[0][v] = vector(line + v * kOne);
  int64_t e = begin;
  const auto subtract_element = [&](int64_t element, int part) LK_LAMBDA {
    const float* row = panel + list.columns[element] * kPanel;
    const float value = list.values[element];
    for (int v = 0; v < kGroup; ++v) sums[part][v] -= value * vector(row + v * kOne);
  };
  for (; e + kSums <= end; e += kSums) {
    for (int part = 0; part < kSums; ++part) subtract_element(e + part, part);
  }
  if (e < end) subtract_element(e, 0);
  for (int v = 0; v < kGroup; ++v) {
    if (kSums > 1) sums[0][v] += sums[kSums - 1][v];
    vector(line + v * kOne) = sums[0][v];
  }
}

// Dropped elements of a row whose products are summed together, so that dY is read once for them.
constexpr int kTogether = 4;
constexpr int kDotSums = kManyRegisters ? 2 : 1;

// sums[i] = dy . the tile's row of the element e + i.
template <int Count>
LK_INLINE void dots_of_row(const DroppedList& list, int64_t e, const float* dy, int64_t count,
                           const float* tile, float* sums) {
  const float* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = tile + list.columns[e + i] * kPiece;
  Vector lanes[kDotSums][Count] = {};
  int64_t n = 0;
  const auto add = [&](int64_t at, int part) LK_LAMBDA {
    const Vector from = vector(dy + at);
    for (int i = 0; i < Count; ++i) lanes[part][i] += from * vector(rows[i] + at);
  };
  for (; n + kDotSums * kOne <= count; n += kDotSums * kOne) {
    for (int part = 0; part < kDotSums; ++part) add(n + part * kOne, part);
  }
  if (n + kOne <= count) add(n, 0), n += kOne;
  for (int i = 0; i < Count; ++i) {
    if (kDotSums > 1) lanes[0][i] += lanes[kDotSums - 1][i];
    sums[i] = sum_of_lanes<float>(lanes[0][i]);
    for (int64_t at = n; at < count; ++at) sums[i] += dy[at] * rows[i][at];
  }
}

template <int Count>
LK_INLINE void replace_elements(const DroppedList& list, int64_t e, const float* dy, int64_t count,
                                const float* tile, bool first, float* dx) {
  float sums[Count];
  dots_of_row<Count>(list, e, dy, count, tile, sums);
  for (int i = 0; i < Count; ++i) {
    float& to = dx[list.columns[e + i]];
    to = first ? sums[i] : to + sums[i];
  }
}

}  // namespace

LK_LOOP void subtract_chunk(const Subtraction& p, Range rows, Range columns, int64_t chunk,
                            const float* panel) {
  const int64_t width = columns.end - columns.begin;
  alignas(64) float buffer[kPanel] = {};
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t* at = p.list.starts + m * p.list.chunks + chunk;
    float* out = p.out + m * p.out_stride + columns.begin;
    float* line = width == kPanel ? out : buffer;
    if (line != out) std::memcpy(line, out, width * sizeof(float));
    for (int64_t n = 0; n < kPanel; n += kGroup * kOne) {
      subtract_row(p.list, at[0], at[1], panel + n, line + n);
    }
    if (line != out) std::memcpy(out, line, width * sizeof(float));
  }
}

LK_LOOP void replace_piece(const Replacement& p, Range rows, int64_t chunk, Range piece,
                           const float* tile) {
  const int64_t count = piece.end - piece.begin;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t* at = p.list.starts + m * p.list.chunks + chunk;
    const float* dy = p.dy + m * p.dy_stride + piece.begin;
    float* dx = p.dx + m * p.dx_stride + chunk * kChunk;
    const bool first = piece.begin == 0;
    int64_t e = at[0];
    for (; e + kTogether <= at[1]; e += kTogether) {
      replace_elements<kTogether>(p.list, e, dy, count, tile, first, dx);
    }
    for (; e < at[1]; ++e) replace_elements<1>(p.list, e, dy, count, tile, first, dx);
  }
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
