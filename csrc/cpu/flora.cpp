#include "flora.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "flora_pass.h"

namespace lora_kernels {
namespace {

// Rows whose sums are taken one after the other, whatever the number of threads.
constexpr int64_t kRows = 64;

struct Sums {
  std::vector<float> rows, cols;
  double weights = 0;
};

FloraRows part_of(const FloraRows& whole, int64_t block) {
  const int64_t first = block * kRows;
  return {whole.gradient + first * whole.cols, whole.weight + first * whole.cols,
          std::min(kRows, whole.rows - first), whole.cols};
}

// Calls run(block) for each block of rows, several at once.
template <typename Run>
void over_blocks(const FloraRows& whole, Run run) {
  const int64_t blocks = (whole.rows + kRows - 1) / kRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) run(block);
  });
}

Sums sums_of(const FloraRows& whole) {
  const int64_t blocks = (whole.rows + kRows - 1) / kRows;
  Sums sums{std::vector<float>(whole.rows), std::vector<float>(whole.cols)};
  std::vector<float> by_block(blocks * whole.cols);
  std::vector<double> weights(blocks);
  over_blocks(whole, [&](int64_t block) {
    weights[block] = flora_sums(part_of(whole, block), sums.rows.data() + block * kRows,
                                by_block.data() + block * whole.cols);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    sums.weights += weights[block];
    const float* part = by_block.data() + block * whole.cols;
    for (int64_t j = 0; j < whole.cols; ++j) sums.cols[j] += part[j];
  }
  return sums;
}

// The running means of squares take their part of new sums over `count`; returns their mean.
double follow(float* means, const std::vector<float>& sums, int64_t count, double beta2,
              double least) {
  double total = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const double now = static_cast<double>(sums[i]) / static_cast<double>(count) + least;
    means[i] = static_cast<float>(beta2 * means[i] + (1 - beta2) * now);
    total += means[i];
  }
  return total / static_cast<double>(sums.size());
}

// sqrt(scale / mean) of each.
at::Tensor inverse_roots(const at::Tensor& means, double scale) {
  at::Tensor roots = at::empty_like(means);
  const float* from = means.const_data_ptr<float>();
  float* to = roots.mutable_data_ptr<float>();
  for (int64_t i = 0; i < means.numel(); ++i) {
    to[i] = static_cast<float>(std::sqrt(scale / from[i]));
  }
  return roots;
}

// M's part of the weight's step; then M takes in what the projection leaves of the update.
void apply_momentum(const at::Tensor& weight, const at::Tensor& gradient,
                    const at::Tensor& momentum, const at::Tensor& projection,
                    const at::Tensor& by_row, const at::Tensor& by_col, double keep, double scale,
                    double beta1) {
  const bool over_columns = weight.size(0) >= weight.size(1);
  const at::Tensor left = over_columns ? momentum : projection.t();
  weight.addmm_(left, over_columns ? projection : momentum, keep, -scale * beta1);
  const at::Tensor own = over_columns
                             ? at::mm(gradient, (projection * by_col).t()).mul_(by_row.unsqueeze(1))
                             : at::mm(projection * by_row, gradient).mul_(by_col);
  momentum.lerp_(own, 1 - beta1);
}

}  // namespace

void flora_step(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& rows,
                const at::Tensor& cols, const std::optional<at::Tensor>& momentum,
                const std::optional<at::Tensor>& projection, double lr, double beta1, double beta2,
                at::ArrayRef<double> eps, double clip, double decay) {
  const FloraRows whole{gradient.const_data_ptr<float>(), weight.mutable_data_ptr<float>(),
                        weight.size(0), weight.size(1)};
  const auto count = static_cast<double>(weight.numel());
  const Sums sums = sums_of(whole);
  const double mean = follow(rows.mutable_data_ptr<float>(), sums.rows, whole.cols, beta2, eps[0]);
  follow(cols.mutable_data_ptr<float>(), sums.cols, whole.rows, beta2, eps[0]);
  at::Tensor by_row = inverse_roots(rows, mean);
  const at::Tensor by_col = inverse_roots(cols, 1);

  const int64_t blocks = (whole.rows + kRows - 1) / kRows;
  std::vector<double> sizes(blocks);
  over_blocks(whole, [&](int64_t block) {
    sizes[block] = flora_size(part_of(whole, block), by_row.const_data_ptr<float>() + block * kRows,
                              by_col.const_data_ptr<float>());
  });
  double size = 0;
  for (const double one : sizes) size += one;
  by_row.mul_(1 / std::max(std::sqrt(size / count) / clip, 1.0));

  double keep = 1 - lr * decay;
  const double scale = lr * std::max(std::abs(keep) * std::sqrt(sums.weights / count), eps[1]);
  double own = scale;
  if (momentum.has_value()) {
    apply_momentum(weight, gradient, *momentum, *projection, by_row, by_col, keep, scale, beta1);
    own *= 1 - beta1;
    keep = 1;
  }
  by_row.mul_(own);
  over_blocks(whole, [&](int64_t block) {
    flora_move(part_of(whole, block), by_row.const_data_ptr<float>() + block * kRows,
               by_col.const_data_ptr<float>(), static_cast<float>(keep));
  });
}

}  // namespace lora_kernels
