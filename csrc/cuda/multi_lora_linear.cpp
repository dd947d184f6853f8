#include "multi_lora_linear.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

#include "decode_launch.h"

namespace lora_kernels::cuda {
namespace {

DecodeCard card_of(int device) {
  static std::mutex mutex;
  static std::map<int, DecodeCard> cards;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = cards.try_emplace(device);
  if (is_new) C10_CUDA_CHECK(decode_card(device, &place->second));
  return place->second;
}

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

struct Plan {
  const Tensor &a_pages, &b_pages, &pages, &spans, &coef, &order, &offsets, &tiles;
};

DecodeProblem problem_of(const Tensor& x, const Plan& plan, int64_t max_rank, const Tensor& y) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x: expected float16 or bfloat16, got ",
              dtype);
  TORCH_CHECK(plan.order.size(0) == x.size(0), "order: expected one adapter a row");
  TORCH_CHECK(max_rank >= 1 && max_rank <= kMaxRank, "max_rank: expected 1 to ", kMaxRank, ", got ",
              max_rank);
  TORCH_CHECK(plan.coef.scalar_type() == at::kFloat && plan.coef.is_contiguous(),
              "coef: expected contiguous float32");
  DecodeProblem p = {};
  p.x = rows_of("x", x, x), p.x_stride = x.stride(0);
  p.rows = static_cast<int>(x.size(0)), p.cols = static_cast<int>(x.size(1));
  p.coef = plan.coef.const_data_ptr<float>();
  p.order = indices("order", plan.order, x), p.offsets = indices("offsets", plan.offsets, x);
  p.tiles = indices("tiles", plan.tiles, x), p.tile_count = static_cast<int>(plan.tiles.size(0));
  p.adapters = static_cast<int>(plan.spans.size(0)), p.max_rank = static_cast<int>(max_rank);
  p.y = static_cast<uint16_t*>(y.mutable_data_ptr()), p.y_stride = y.stride(0);
  p.projections = 1;
  p.projection[0] = {rows_of("a_pages", plan.a_pages, x),
                     rows_of("b_pages", plan.b_pages, x),
                     plan.a_pages.stride(0),
                     plan.b_pages.stride(0),
                     indices("pages", plan.pages, x),
                     indices("spans", plan.spans, x),
                     0,
                     static_cast<int>(plan.b_pages.size(1))};
  return p;
}

DecodeElement element_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? DecodeElement::kBrain : DecodeElement::kHalf;
}

void check_shared(const DecodeProblem& p, int rows, const DecodeCard& card) {
  const int bytes = shared_layout(p, rows).bytes;
  TORCH_CHECK(bytes <= card.shared_limit, "the decode kernel needs ", bytes,
              " bytes of shared memory a block, and this card has ", card.shared_limit);
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
  const Plan plan = {a_pages, b_pages, pages, spans, coef, order, offsets, tiles};
  DecodeProblem p = problem_of(x, plan, max_rank, y);
  check_shared(p, kTileRows, card);
  Tensor parts;
  if (!card.clusters) {
    parts = at::empty({p.tile_count * part_elements(p.max_rank)}, x.options().dtype(at::kFloat));
    p.parts = parts.mutable_data_ptr<float>();
  }
  C10_CUDA_CHECK(launch_decode_delta(p, element_of(x), card, c10::cuda::getCurrentCUDAStream()));
  return {y, at::empty({0, max_rank}, x.options())};
}

Tensor multi_lora_linear_fused(const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Tensor& a_pages,
                               const Tensor& b_pages, const Tensor& pages, const Tensor& spans,
                               const Tensor& coef, const Tensor& order, const Tensor& offsets,
                               const Tensor& tiles, int64_t max_rank) {
  TORCH_CHECK(x.size(0) <= kLinearRows, "x: expected at most ", kLinearRows, " rows, got ",
              x.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  const DecodeCard card = card_of(x.get_device());
  TORCH_CHECK(card.clusters, "the fused decode kernel needs compute capability 9.0");
  Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const Plan plan = {a_pages, b_pages, pages, spans, coef, order, offsets, tiles};
  DecodeProblem p = problem_of(x, plan, max_rank, y);
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
