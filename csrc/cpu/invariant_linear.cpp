// The rows of W are the pages of one adapter of rank N: gather_pass.h sums them in one order.
#include "invariant_linear.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "gather_pass.h"
#include "math_type.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

// Rows of W that one task multiplies with all rows of x.
constexpr int64_t kOutputs = 64;

std::vector<int32_t> counting(int64_t count) {
  std::vector<int32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

}  // namespace

at::Tensor invariant_linear(const at::Tensor& x, const at::Tensor& weight) {
  const auto math = math_of(x.scalar_type());
  const at::Tensor wide = with_dense_rows(x.to(math)), dense = with_dense_rows(weight);
  const int64_t count = x.size(0), outputs = weight.size(0);
  at::Tensor y = at::empty({count, outputs}, wide.options());
  const auto rows_index = counting(count), pages_index = counting(outputs);
  const Pages pages = {dense.const_data_ptr(), storage_of(dense.scalar_type()), dense.stride(0),
                       dense.size(1), pages_index.data()};
  in_math(math, [&](auto zero) {
    using Math = decltype(zero);
    const Rows<Math> rows = {wide.const_data_ptr<Math>(), wide.stride(0), rows_index.data(), count,
                             1};
    auto* out = y.mutable_data_ptr<Math>();
    at::parallel_for(0, (outputs + kOutputs - 1) / kOutputs, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kOutputs, outputs);
      dots(rows, pages, begin * kOutputs, last, out, outputs);
    });
  });
  return y.to(x.scalar_type());
}

}  // namespace lora_kernels
