#include "multi_lora_linear.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "decode_card.h"

namespace lora_kernels::cuda {
namespace {

// A matrix of x's dtype whose rows can be copied sixteen bytes at a time.
const uint16_t* rows_of(const char* name, const Tensor& matrix, const Tensor& x) {
  TORCH_CHECK(matrix.scalar_type() == x.scalar_type() && matrix.device() == x.device(), name,
              ": expected ", x.scalar_type(), " on ", x.device(), " as x, got ",
              matrix.scalar_type(), " on ", matrix.device());
  const auto* data = static_cast<const uint16_t*>(matrix.const_data_ptr());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                       (matrix.size(0) <= 1 || matrix.stride(0) % 8 == 0) && matrix.stride(1) == 1;
  TORCH_CHECK(matrix.size(1) % 16 == 0 && aligned, name,
              ": expected columns of unit stride in multiples of 16, and aligned rows, got shape ",
              matrix.sizes(), " and strides ", matrix.strides());
  return data;
}

const int32_t* indices(const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK(
      tensor.scalar_type() == at::kInt && tensor.is_contiguous() && tensor.device() == x.device(),
      name, ": expected contiguous int32 on ", x.device());
  return tensor.const_data_ptr<int32_t>();
}

const float* factors(const char* name, const Tensor& tensor, int64_t count, const Tensor& x) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                  tensor.numel() == count && tensor.device() == x.device(),
              name, ": expected contiguous float32 [", count, "] on ", x.device());
  return tensor.const_data_ptr<float>();
}

struct Plan {
  const Tensor &order, &offsets, &tiles;
};

// Rows of x, each with the adapter that the plan has for it; projections are yet to come.
DecodeProblem problem_of(const Tensor& x, const Plan& plan, int64_t adapters, int64_t max_rank,
                         const Tensor& y) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x: expected float16 or bfloat16, got ",
              dtype);
  TORCH_CHECK(plan.order.size(0) == x.size(0), "order: expected one adapter a row");
  TORCH_CHECK(max_rank >= 1 && max_rank <= kMaxRank, "max_rank: expected 1 to ", kMaxRank, ", got ",
              max_rank);
  DecodeProblem p = {};
  p.x = rows_of("x", x, x), p.x_stride = x.stride(0);
  p.rows = static_cast<int>(x.size(0)), p.cols = static_cast<int>(x.size(1));
  p.order = indices("order", plan.order, x), p.offsets = indices("offsets", plan.offsets, x);
  p.tiles = indices("tiles", plan.tiles, x), p.tile_count = static_cast<int>(plan.tiles.size(0));
  p.adapters = static_cast<int>(adapters), p.max_rank = static_cast<int>(max_rank);
  p.y = static_cast<uint16_t*>(y.mutable_data_ptr()), p.y_stride = y.stride(0);
  return p;
}

// Adds the adapters of one linear, whose columns of y come after those that are there.
void add_projection(DecodeProblem& p, const Tensor& x, const Tensor& a_pages, const Tensor& b_pages,
                    const Tensor& pages, const Tensor& spans, const float* scalings,
                    int64_t out_begin) {
  TORCH_CHECK(spans.size(0) == p.adapters, "spans: expected ", p.adapters, " adapters, got ",
              spans.size(0));
  p.projection[p.projections++] = {rows_of("a_pages", a_pages, x),
                                   rows_of("b_pages", b_pages, x),
                                   a_pages.stride(0),
                                   b_pages.stride(0),
                                   indices("pages", pages, x),
                                   indices("spans", spans, x),
                                   scalings,
                                   static_cast<int>(out_begin),
                                   static_cast<int>(b_pages.size(1))};
}

DecodeElement element_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? DecodeElement::kBrain : DecodeElement::kHalf;
}

void check_shared(const DecodeProblem& p, int rows, const DecodeCard& card) {
  const int bytes = shared_layout(p, rows).bytes;
  TORCH_CHECK(bytes <= card.shared_limit, "the decode kernel needs ", bytes,
              " bytes of shared memory a block, and this card has ", card.shared_limit);
}

void launch_delta(DecodeProblem& p, const Tensor& x, const DecodeCard& card) {
  check_shared(p, kTileRows, card);
  Tensor parts;
  if (!card.clusters) {
    const int64_t tiles = int64_t(p.projections) * p.tile_count;
    parts = at::empty({tiles * part_elements(p.max_rank)}, x.options().dtype(at::kFloat));
    p.parts = parts.mutable_data_ptr<float>();
  }
  C10_CUDA_CHECK(launch_decode_delta(p, element_of(x), card, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

std::tuple<Tensor, Tensor> multi_lora_linear(const Tensor& x, const Tensor& a_pages,
                                             const Tensor& b_pages, const Tensor& pages,
                                             const Tensor& spans, const Tensor& coef,
                                             const Tensor& order, const Tensor& offsets,
                                             const Tensor& tiles, const std::optional<Tensor>& mask,
                                             const std::optional<Tensor>& keep_scale,
                                             int64_t max_rank, bool keep_h) {
  TORCH_CHECK(!mask.has_value() && !keep_scale.has_value() && !keep_h,
              "the decode kernel has no dropout and keeps no h");
  const c10::cuda::CUDAGuard guard(x.device());
  const DecodeCard card = card_of(x.get_device());
  Tensor y = at::empty({x.size(0), b_pages.size(1)}, x.options());
  DecodeProblem p = problem_of(x, {order, offsets, tiles}, spans.size(0), max_rank, y);
  p.coef = factors("coef", coef, x.size(0), x);
  add_projection(p, x, a_pages, b_pages, pages, spans, nullptr, 0);
  launch_delta(p, x, card);
  return {y, at::empty({0, max_rank}, x.options())};
}

void multi_lora_linear_add(const Tensor& y, const Tensor& x, at::TensorList a_pages,
                           at::TensorList b_pages, at::TensorList pages, at::TensorList spans,
                           at::TensorList scalings, const std::optional<Tensor>& weights,
                           const Tensor& order, const Tensor& offsets, const Tensor& tiles,
                           const std::optional<Tensor>&, int64_t max_rank, bool) {
  const c10::cuda::CUDAGuard guard(x.device());
  const DecodeCard card = card_of(x.get_device());
  const size_t count = a_pages.size();
  const int64_t adapters = spans[0].size(0);
  rows_of("y", y, x);
  DecodeProblem p = problem_of(x, {order, offsets, tiles}, adapters, max_rank, y);
  p.accumulate = true;
  if (weights.has_value()) p.coef = factors("weights", *weights, x.size(0), x);
  // All of them before the first launch: what does not fit leaves y alone.
  std::vector<DecodeProblem> problems(ceil_div(static_cast<int>(count), kMaxProjections), p);
  int64_t width = 0;
  for (size_t i = 0; i < count; ++i) {
    const float* own = factors("scalings", scalings[i], adapters, x);
    add_projection(problems[i / kMaxProjections], x, a_pages[i], b_pages[i], pages[i], spans[i],
                   own, width);
    width += b_pages[i].size(1);
  }
  TORCH_CHECK(y.size(0) == x.size(0) && y.size(1) == width, "y: expected shape [", x.size(0), ", ",
              width, "], got ", y.sizes());
  for (DecodeProblem& problem : problems) launch_delta(problem, x, card);
}

Tensor multi_lora_linear_fused(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& a_pages,
                               const Tensor& b_pages, const Tensor& pages, const Tensor& spans,
                               const Tensor& scalings, const std::optional<Tensor>& weights,
                               const Tensor& order, const Tensor& offsets, const Tensor& tiles,
                               int64_t max_rank) {
  TORCH_CHECK(x.size(0) <= kLinearRows, "x: expected at most ", kLinearRows, " rows, got ",
              x.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  const DecodeCard card = card_of(x.get_device());
  TORCH_CHECK(card.clusters, "the fused decode kernel needs compute capability 9.0");
  Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  DecodeProblem p = problem_of(x, {order, offsets, tiles}, spans.size(0), max_rank, y);
  if (weights.has_value()) p.coef = factors("weights", *weights, x.size(0), x);
  const float* own = factors("scalings", scalings, spans.size(0), x);
  add_projection(p, x, a_pages, b_pages, pages, spans, own, 0);
  p.weight = rows_of("weight", weight, x), p.weight_stride = weight.stride(0);
  if (bias.has_value()) {
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->is_contiguous(),
                "bias: expected contiguous ", x.scalar_type());
    p.bias = static_cast<const uint16_t*>(bias->const_data_ptr());
  }
  // Two thread blocks a multiprocessor, all of them at once.
  const int clusters = 2 * card.multiprocessors / kCluster;
  p.cluster_cols = columns_per_cluster(p.projection[0].out_cols, clusters);
  check_shared(p, kLinearRows, card);
  C10_CUDA_CHECK(launch_decode_linear(p, element_of(x), c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace lora_kernels::cuda
