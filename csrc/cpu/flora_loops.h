// The loops of flora_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

LK_INLINE double sum_of_lanes(const VectorOf<float>& sums) {
  double total = 0;
  for (int lane = 0; lane < kWidth<float>; ++lane) total += sums[lane];
  return total;
}

// Calls wide(j) for each whole vector of columns, then one(j) for each column that is left.
template <typename Wide, typename One>
LK_INLINE void over_columns(int64_t cols, Wide wide, One one) {
  int64_t j = 0;
  for (; j + kWidth<float> <= cols; j += kWidth<float>) wide(j);
  for (; j < cols; ++j) one(j);
}

}  // namespace

LK_LOOP double flora_sums(const FloraRows& part, float* row_sums, float* col_sums) {
  double weights = 0;
  for (int64_t i = 0; i < part.rows; ++i) {
    const float* g = part.gradient + i * part.cols;
    const float* w = part.weight + i * part.cols;
    VectorOf<float> squares{}, sizes{};
    float square = 0, size = 0;
    over_columns(
        part.cols,
        [&](int64_t j) LK_LAMBDA {
          const VectorOf<float> now = vector(g + j) * vector(g + j);
          vector(col_sums + j) += now;
          squares += now;
          sizes += vector(w + j) * vector(w + j);
        },
        [&](int64_t j) LK_LAMBDA {
          col_sums[j] += g[j] * g[j];
          square += g[j] * g[j];
          size += w[j] * w[j];
        });
    row_sums[i] = static_cast<float>(sum_of_lanes(squares) + square);
    weights += sum_of_lanes(sizes) + size;
  }
  return weights;
}

LK_LOOP double flora_size(const FloraRows& part, const float* by_row, const float* by_col) {
  double total = 0;
  for (int64_t i = 0; i < part.rows; ++i) {
    const float* g = part.gradient + i * part.cols;
    VectorOf<float> squares{};
    float square = 0;
    over_columns(
        part.cols,
        [&](int64_t j) LK_LAMBDA {
          const VectorOf<float> now = vector(g + j) * vector(by_col + j);
          squares += now * now;
        },
        [&](int64_t j) LK_LAMBDA { square += g[j] * by_col[j] * g[j] * by_col[j]; });
    total += (sum_of_lanes(squares) + square) * by_row[i] * by_row[i];
  }
  return total;
}

LK_LOOP void flora_move(const FloraRows& part, const float* by_row, const float* by_col,
                        float keep) {
  for (int64_t i = 0; i < part.rows; ++i) {
    const float* g = part.gradient + i * part.cols;
    float* w = part.weight + i * part.cols;
    const float scale = by_row[i];
    over_columns(
        part.cols,
        [&](int64_t j) LK_LAMBDA {
          vector(w + j) = vector(w + j) * keep - vector(g + j) * vector(by_col + j) * scale;
        },
        [&](int64_t j) LK_LAMBDA { w[j] = w[j] * keep - g[j] * by_col[j] * scale; });
  }
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
