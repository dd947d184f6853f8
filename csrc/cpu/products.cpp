#include "products.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "branch.h"
#include "kept_memory.h"
#include "math_type.h"
#include "panel_pass.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

// Whether the processor multiplies that dtype, as oneDNN's products need.
bool narrow_is_native(at::ScalarType dtype) {
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 12)
  static const bool bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  static const bool fp16 = __builtin_cpu_supports("avx512fp16") != 0;
  return dtype == at::kBFloat16 ? bf16 : fp16;
#else
  return true;  // cannot be asked, so it is left to PyTorch
#endif
}

using at::Tensor;

// A branch of fewer rows is less work than its factor's copy.
constexpr int64_t kFewRows = 8;
// Rows of the left factors that are packed at a time: enough for a right factor to repay its
// packing, and no more elements than kPacked where that leaves enough.
constexpr int64_t kFewestAtOnce = 512, kMostAtOnce = 1024, kPacked = int64_t(1) << 23;
// Elements to pack, and multiply-adds, that are worth a thread.
constexpr int64_t kPackTask = 1 << 15, kMultiplyTask = 1 << 19;

bool is_transposed(const Tensor& right) { return right.stride(1) != 1 && right.stride(0) == 1; }

Tensor readable(const Tensor& right) {
  return is_transposed(right) ? right : with_dense_rows(right);
}

int64_t total_depth(const std::vector<Tensor>& lefts) {
  int64_t depth = 0;
  for (const Tensor& left : lefts) depth += left.size(1);
  return depth;
}

// The rows [first, first + rows) of each left factor, in panels, one after the other.
std::vector<const float*> packed_rows(const std::vector<Tensor>& lefts, int64_t first,
                                      int64_t rows) {
  const int64_t each = panel_shape().rows, panels = panels_of(rows, each);
  const int64_t depth = total_depth(lefts);
  thread_local KeptMemory<float> memory;
  std::vector<float*> packed = {memory.room(panels * each * depth)};
  for (const Tensor& left : lefts) {
    packed.push_back(packed.back() + panels * each * left.size(1));
  }
  const int64_t grain = std::max<int64_t>(1, kPackTask / std::max<int64_t>(1, each * depth));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < lefts.size(); ++i) {
      const float* from = lefts[i].const_data_ptr<float>() + first * lefts[i].stride(0);
      pack_rows(from, lefts[i].stride(0), rows, lefts[i].size(1), {begin, end}, packed[i]);
    }
  });
  return {packed.begin(), packed.end()};
}

std::vector<PanelTerm> terms_of(const ProductSum& sum, const std::vector<const float*>& packed) {
  std::vector<PanelTerm> terms;
  for (const auto& [left, right] : sum.products) {
    const bool transposed = is_transposed(right);
    terms.push_back({packed[left], right.const_data_ptr<float>(), right.stride(transposed ? 1 : 0),
                     transposed, right.size(0)});
  }
  return terms;
}

int64_t depth_of(const std::vector<PanelTerm>& terms) {
  int64_t depth = 0;
  for (const PanelTerm& term : terms) depth += term.depth;
  return depth;
}

// Tiles are shared out by columns, and where there are few of those by rows as well. Which thread
// sums a tile changes none of its sums.
void multiply(const PanelProduct& product, int64_t depth) {
  const PanelShape shape = panel_shape();
  const int64_t rows = panels_of(product.rows, shape.rows);
  const int64_t cols = panels_of(product.cols, shape.cols);
  if (cols == 0) return;
  const int64_t cuts = std::clamp<int64_t>(panels_of(shape.at_once * at::get_num_threads(), cols),
                                           1, std::max<int64_t>(1, rows / 8));
  const int64_t each =
      panels_of(rows, cuts) * shape.rows * shape.cols * std::max<int64_t>(depth, 1);
  const int64_t grain = std::max<int64_t>(1, kMultiplyTask / each);
  at::parallel_for(0, cuts * cols, grain, [&](int64_t begin, int64_t end) {
    thread_local KeptMemory<float> memory;
    float* scratch = memory.room(shape.scratch());
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t cut = at / cols;
      next = std::min(end, (cut + 1) * cols);
      multiply_panels(product, {rows * cut / cuts, rows * (cut + 1) / cuts},
                      {at - cut * cols, next - cut * cols}, scratch);
    }
  });
}

void add_rows(const ProductSum& sum, const std::vector<const float*>& packed, int64_t first,
              int64_t rows) {
  const std::vector<PanelTerm> terms = terms_of(sum, packed);
  const PanelProduct product = {terms.data(),
                                static_cast<int64_t>(terms.size()),
                                rows,
                                sum.out.size(1),
                                sum.out.mutable_data_ptr<float>() + first * sum.out.stride(0),
                                sum.out.stride(0),
                                sum.bias ? sum.bias->const_data_ptr<float>() : nullptr,
                                sum.add};
  multiply(product, depth_of(terms));
}

// Products of a narrow dtype that the processor has no instructions for are PyTorch's slowest. They
// go through float here, by blocks of both factors, so that no large one is ever held twice.
bool in_blocks(const Tensor& left) {
  const auto dtype = left.scalar_type();
  return dtype != math_of(dtype) && !narrow_is_native(dtype);
}

// Elements of a block of the right factor and of the left one; rows to which a block of the right
// one is applied, so that its conversion is little beside the product.
constexpr int64_t kRightBlock = int64_t(1) << 20, kLeftBlock = int64_t(1) << 22;
constexpr int64_t kFewestBlockRows = 256, kMostBlockRows = 1024;

// run(first row, rows, first column, columns, left's rows and right's columns in float). Autocast
// would take the blocks back to half precision.
template <typename Run>
void over_float_blocks(const Tensor& left, const Tensor& right, Run run) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t rows = left.size(0), depth = std::max<int64_t>(1, left.size(1));
  const int64_t cols = right.size(1);
  const int64_t each_rows = std::clamp(kLeftBlock / depth, kFewestBlockRows, kMostBlockRows);
  const int64_t each_cols =
      std::clamp<int64_t>(kRightBlock / depth, 32, std::max<int64_t>(32, cols));
  for (int64_t row = 0; row < rows; row += each_rows) {
    const int64_t m = std::min(each_rows, rows - row);
    const Tensor wide_left = left.narrow(0, row, m).to(at::kFloat);
    for (int64_t col = 0; col < cols; col += each_cols) {
      const int64_t n = std::min(each_cols, cols - col);
      run(row, m, col, n, wide_left, right.narrow(1, col, n).to(at::kFloat));
    }
  }
}

Tensor blocked_branched_product(Way way, const Tensor& left, const Tensor& right,
                                const std::optional<Tensor>& bias, const Tensor& vectors,
                                const Tensor& factor, double scaling) {
  const Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  const Tensor v = vectors.to(at::kFloat), f = factor.to(at::kFloat);
  const auto block = [&](int64_t row, int64_t m, int64_t col, int64_t n, const Tensor& wide_left,
                         const Tensor& wide_right) {
    std::optional<Tensor> start;
    if (bias) start = bias->narrow(0, col, n).to(at::kFloat);
    const Tensor sum = branched_product(way, wide_left, wide_right, start, v.narrow(0, row, m),
                                        f.narrow(1, col, n), scaling);
    out.narrow(0, row, m).narrow(1, col, n).copy_(sum);
  };
  over_float_blocks(left, right, block);
  return out;
}

// out = L R, or added to what it holds: each sum is rounded once.
void blocked_product(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
  over_float_blocks(left, right,
                    [&](int64_t row, int64_t m, int64_t col, int64_t n, const Tensor& wide_left,
                        const Tensor& wide_right) {
                      const Tensor to = out.narrow(0, row, m).narrow(1, col, n);
                      to.copy_(add ? at::addmm(to.to(at::kFloat), wide_left, wide_right)
                                   : at::mm(wide_left, wide_right));
                    });
}

// The branch as an update of the product: scaled by the way, and in two calls.
Tensor updated_product(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias,
                       const Tensor& vectors, const Tensor& factor, double scaling) {
  Tensor out = bias ? at::addmm(*bias, left, right) : at::mm(left, right);
  return out.addmm_(vectors.to(left.scalar_type()), factor.to(left.scalar_type()), 1, scaling);
}

Tensor torchs_branched_product(const Tensor& left, const Tensor& right,
                               const std::optional<Tensor>& bias, const Tensor& vectors,
                               const Tensor& factor, double scaling) {
  if (left.size(0) < kFewRows) return updated_product(left, right, bias, vectors, factor, scaling);
  const auto dtype = left.scalar_type();
  const Tensor v = vectors.to(dtype), f = factor.to(dtype);
  Tensor out = bias ? at::addmm(*bias, v, f, 1, scaling) : product(Way::kTorch, v, f, scaling);
  return out.addmm_(left, right);
}

// The branch comes first, as the product then costs no more than to write it; but one of few rows
// is less work than its factor's copy, and one of a narrow dtype would be rounded.
Tensor vendors_branched_product(const Tensor& left, const Tensor& right,
                                const std::optional<Tensor>& bias, const Tensor& vectors,
                                const Tensor& factor, double scaling) {
  const auto dtype = left.scalar_type();
  if (left.size(0) < kFewRows || dtype != math_of(dtype)) {
    return updated_product(left, right, bias, vectors, factor, scaling);
  }
  Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  if (bias) out.copy_(*bias);
  expand_into(out, vectors, factor, std::nullopt, scaling, bias.has_value());
  return out.addmm_(left, right);
}

}  // namespace

Tensor branched_product(Way way, const Tensor& left, const Tensor& right,
                        const std::optional<Tensor>& bias, const Tensor& vectors,
                        const Tensor& factor, double scaling) {
  const int64_t rank = factor.size(0);
  const Tensor used = vectors.size(1) == rank ? vectors : vectors.narrow(1, 0, rank);
  if (in_blocks(left)) {
    return blocked_branched_product(way, left, right, bias, used, factor, scaling);
  }
  if (way == Way::kTorch) {
    return torchs_branched_product(left, right, bias, used, factor, scaling);
  }
  if (way != Way::kPanels) {
    return vendors_branched_product(left, right, bias, used, factor, scaling);
  }
  Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  const Tensor scaled = scaling == 1.0 ? used : used.mul(scaling);
  sum_products({left, scaled}, {{out, bias, {{0, right}, {1, factor.to(at::kFloat)}}}});
  return out;
}

Tensor product(Way way, const Tensor& left, const Tensor& right, double scaling) {
  const bool blocked = in_blocks(left);
  if (!blocked && way != Way::kPanels && scaling == 1.0) return at::mm(left, right);
  const Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  if (!blocked && way != Way::kPanels) return out.addmm_(left, right, 0, scaling);
  if (blocked) {
    blocked_product(out, left, right, false);
  } else {
    sum_products({left}, {{out, std::nullopt, {{0, right}}}});
  }
  return scaling == 1.0 ? out : out.mul_(scaling);
}

void accumulate_product(Way way, const Tensor& out, const Tensor& left, const Tensor& right) {
  if (in_blocks(left)) {
    blocked_product(out, left, right, true);
  } else if (way == Way::kPanels) {
    sum_products({left}, {{out, std::nullopt, {{0, right}}, true}});
  } else {
    out.addmm_(left, right);
  }
}

void sum_products(const std::vector<Tensor>& lefts, const std::vector<ProductSum>& sums) {
  std::vector<ProductSum> readable_sums = sums;
  for (ProductSum& sum : readable_sums) {
    if (sum.bias) sum.bias = sum.bias->contiguous();
    for (Product& product : sum.products) product.right = readable(product.right);
  }
  std::vector<Tensor> dense;
  for (const Tensor& left : lefts) dense.push_back(with_dense_rows(left));
  const int64_t rows = lefts[0].size(0);
  const int64_t each =
      std::clamp(kPacked / std::max<int64_t>(1, total_depth(dense)), kFewestAtOnce, kMostAtOnce);
  for (int64_t first = 0; first < rows; first += each) {
    const int64_t count = std::min(each, rows - first);
    const std::vector<const float*> packed = packed_rows(dense, first, count);
    for (const ProductSum& sum : readable_sums) add_rows(sum, packed, first, count);
  }
}

}  // namespace lora_kernels
