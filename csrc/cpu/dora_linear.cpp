// y = x W' + b + z * c - d W' with d = drop(x) and z = d (W + s B A)', and its gradients on the
// CPU.
//
// The large products, and their branches, are those of products.h. With dropout there are two in
// each direction, as c differs from one output to the next: of d (or dY (c - 1)), and of what
// dropout took from x, which accumulates. Where dropout takes little, the second one is sparse
// (dropped_pass.h): d W' is (x W' - x_dropped W') / (1 - p), and dX is (dY * factor) W but where x
// was dropped.
#include "dora_linear.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "branch.h"
#include "dropout.h"
#include "dropped_pass.h"
#include "gate.h"
#include "lora_linear.h"
#include "math_type.h"
#include "products.h"
#include "scale_pass.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

Way way_for(Op op, const Tensor& rows, const Tensor& weight, const Tensor& lora_a) {
  return way_of(op, rows.scalar_type(), {rows.size(0), weight.numel(), lora_a.size(0)});
}

Tensor vector_of(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.to(math_of(dtype)).contiguous();
}

template <typename Pass>
void over_rows(const Pass& pass, int64_t rows, int64_t cols) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, cols));
  at::parallel_for(0, rows, grain,
                   [&](int64_t begin, int64_t end) { run(pass, {begin, end}, cols); });
}

// z * scale + bias, in z's own memory if it is not needed any more.
Tensor scaled(const Tensor& z, const Tensor& scale, const OptTensor& bias, bool keep_z) {
  Tensor y = keep_z ? at::empty_like(z) : z;
  const Tensor c = vector_of(scale, z.scalar_type());
  const Tensor b = has(bias) ? vector_of(*bias, z.scalar_type()) : Tensor();
  in_math(c.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Scaling<Math> pass = {matrix_of(z), c.const_data_ptr<Math>(),
                                b.defined() ? b.const_data_ptr<Math>() : nullptr, matrix_of(y)};
    over_rows(pass, z.size(0), z.size(1));
  });
  return y;
}

// y += z * (scale - 1) + bias.
void add_scaled(Tensor& y, const Tensor& z, const Tensor& scale, const OptTensor& bias) {
  const Tensor factor = vector_of(scale, at::kFloat).sub(1);
  const Tensor b = has(bias) ? vector_of(*bias, at::kFloat) : Tensor();
  const Scaling<float> pass = {matrix_of(z), factor.const_data_ptr<float>(),
                               b.defined() ? b.const_data_ptr<float>() : nullptr, matrix_of(y),
                               true};
  over_rows(pass, z.size(0), z.size(1));
}

// d = drop(x), and x - d.
std::pair<Tensor, Tensor> split(const Tensor& x_in, const Tensor& mask, double p) {
  const Tensor x = with_dense_rows(x_in);
  Tensor dropped = at::empty({x.size(0), x.size(1)}, x.options());
  Tensor rest = at::empty_like(dropped);
  const Keep keep = {mask.const_data_ptr<uint8_t>(), mask.stride(0), 1.0 / (1.0 - p)};
  over_rows(Splitting{matrix_of(x), keep, matrix_of(dropped), matrix_of(rest)}, x.size(0),
            x.size(1));
  return {dropped, rest};
}

// dY * factor, where that is asked for, and the column sums of dY * z, where there is a z.
std::pair<Tensor, Tensor> unscaled(const Tensor& dy_in, const Tensor& factor, bool needs_scaled,
                                   const OptTensor& z) {
  const Tensor dy = with_dense_rows(dy_in);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  Tensor result = needs_scaled ? at::empty({rows, cols}, dy.options()) : Tensor();
  Tensor sums = has(z) ? at::zeros({cols}, factor.options()) : Tensor();
  in_math(factor.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Unscaling<Math> pass = {matrix_of(dy), factor.const_data_ptr<Math>(), matrix_of(result),
                                  matrix_of(z.value_or(Tensor())),
                                  has(z) ? sums.mutable_data_ptr<Math>() : nullptr};
    // By columns, so that each sum runs over the rows in their order.
    at::parallel_for(0, (cols + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
      run(pass, {0, rows}, {begin * kStrip, std::min(end * kStrip, cols)});
    });
  });
  return {result, sums};
}

// into += keep * x.
void add_kept(Tensor& into, const Tensor& x, const Tensor& mask) {
  const Keep keep = {mask.const_data_ptr<uint8_t>(), mask.stride(0), 1.0};
  over_rows(Keeping{matrix_of(x), keep, matrix_of(into)}, x.size(0), x.size(1));
}

// Sparse products run at about a third of the dense one's speed, so p is well below that.
bool sparse(const Tensor& x, const Tensor& weight, double p) {
  return x.scalar_type() == at::kFloat && p > 0 && p <= 0.2 && x.size(0) >= 32 &&
         weight.stride(1) == 1;
}

// The dropped elements of x, in memory that lives as long as this.
class Dropped {
 public:
  Dropped(const Tensor& mask, int64_t cols, const Tensor& x) {
    const int64_t rows = mask.size(0);
    list.chunks = (cols + kChunk - 1) / kChunk;
    starts_ = at::zeros({rows * list.chunks + 1}, mask.options().dtype(at::kLong));
    auto* starts = starts_.mutable_data_ptr<int64_t>();
    const auto* keep = mask.const_data_ptr<uint8_t>();
    const int64_t stride = mask.stride(0),
                  grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, cols));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      count_dropped(keep, stride, cols, {begin, end}, starts + 1);
    });
    for (int64_t i = 0; i < rows * list.chunks; ++i) starts[i + 1] += starts[i];
    const int64_t total = starts[rows * list.chunks];
    columns_ = at::empty({total}, mask.options());
    if (x.defined()) values_ = at::empty({total}, x.options());
    auto* columns = columns_.mutable_data_ptr<uint8_t>();
    auto* values = x.defined() ? values_.mutable_data_ptr<float>() : nullptr;
    const auto* from = x.defined() ? x.const_data_ptr<float>() : nullptr;
    const int64_t x_stride = x.defined() ? x.stride(0) : 0;
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      list_dropped(keep, stride, from, x_stride, cols, {begin, end}, starts, columns, values);
    });
    list.starts = starts;
    list.columns = columns;
    list.values = values;
  }

  DroppedList list = {};

 private:
  Tensor starts_, columns_, values_;
};

// Calls run(rows, task) for blocks of rows and each of `count` other tasks.
template <typename Run>
void over_blocks(int64_t rows, int64_t count, Run run) {
  const int64_t blocks = (rows + kTaskRows - 1) / kTaskRows;
  at::parallel_for(0, blocks * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / count * kTaskRows;
      run(Range{first, std::min(first + kTaskRows, rows)}, task % count);
    }
  });
}

// base - x_dropped W'.
Tensor without_dropped(const Tensor& base, const Tensor& x_in, const Tensor& mask,
                       const Tensor& weight) {
  const Tensor x = with_dense_rows(x_in);
  const int64_t rows = x.size(0), cols = x.size(1), out = weight.size(0);
  const Dropped dropped(mask, cols, x);
  Tensor result = base.clone();
  const Subtraction pass = {dropped.list, weight.const_data_ptr<float>(),   weight.stride(0),
                            cols,         result.mutable_data_ptr<float>(), out};
  over_blocks(rows, (out + kPanel - 1) / kPanel, [&](Range block, int64_t panel) {
    subtract(pass, block, {panel * kPanel, std::min((panel + 1) * kPanel, out)});
  });
  return result;
}

// Where x was dropped, dX = dY W.
void replace_dropped(Tensor& dx, const Tensor& dy_in, const Tensor& mask, const Tensor& weight) {
  const Tensor dy = with_dense_rows(dy_in);
  const int64_t rows = dy.size(0), cols = dx.size(1), out = dy.size(1);
  const Dropped dropped(mask, cols, Tensor());
  const Replacement pass = {dropped.list,
                            dy.const_data_ptr<float>(),
                            dy.stride(0),
                            weight.const_data_ptr<float>(),
                            weight.stride(0),
                            out,
                            cols,
                            dx.mutable_data_ptr<float>(),
                            cols};
  over_blocks(rows, dropped.list.chunks, [&](Range block, int64_t chunk) {
    const Tensor tile = at::empty({kChunk * kPiece}, dy.options());
    replace(pass, block, chunk, tile.mutable_data_ptr<float>());
  });
}

// The forward pass with the sparse second product.
std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_dora_linear(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& scale, const OptTensor& bias, const Tensor& mask, double scaling, double p) {
  const Tensor packed = shrink({x, mask, p}, pack_transposed(lora_a, at::kFloat));
  const Tensor h = unpack(packed, lora_a.size(0), at::kFloat);
  const Tensor b_t = lora_b.to(at::kFloat).t();
  const Way way = way_for(Op::kDora, x, weight, lora_a);
  Tensor y = product(way, x, weight.t());
  Tensor z = without_dropped(y, x, mask, weight);
  z.addmm_(h, b_t, 1.0 / (1.0 - p), scaling);
  // y = x W' + b - d W' + z * c, and z = d W' + s h B'.
  y.addmm_(h, b_t, 1, scaling);
  add_scaled(y, z, scale, bias);
  return {y, z, h, mask};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear(const Tensor& x, const Tensor& weight,
                                                       const Tensor& lora_a, const Tensor& lora_b,
                                                       const Tensor& scale, const OptTensor& bias,
                                                       const OptTensor& seed, double scaling,
                                                       double dropout_p, bool keep_z) {
  const auto dtype = x.scalar_type();
  Tensor mask = at::empty({0}, x.options().dtype(at::kByte)), branch = x, rest;
  if (has(seed)) {
    mask = dropout_mask(*seed, x.size(0), x.size(1), dropout_p);
    if (sparse(x, weight, dropout_p)) {
      auto results =
          sparse_dora_linear(x, weight, lora_a, lora_b, scale, bias, mask, scaling, dropout_p);
      if (!keep_z) std::get<1>(results) = at::empty({0, weight.size(0)}, x.options());
      return results;
    }
    std::tie(branch, rest) = split(x, mask, dropout_p);
  }
  const Tensor packed = shrink({branch, std::nullopt, 0.0}, pack_transposed(lora_a, dtype));
  const Tensor h = unpack(packed, lora_a.size(0), dtype);
  const Way way = way_for(Op::kDora, x, weight, lora_a);
  Tensor z = branched_product(way, branch, weight.t(), std::nullopt, packed, lora_b.t(), scaling);
  Tensor y = scaled(z, scale, bias, keep_z);
  if (has(seed)) accumulate_product(way, y, rest, weight.t());
  return {y, keep_z ? z : at::empty({0, z.size(1)}, z.options()), h, mask};
}

namespace {

// The gradients without dropout, all that read dY from one pass over it.
std::vector<Tensor> grads_in_one_pass(const Tensor& dy, const OptTensor& x, const Tensor& weight,
                                      const Tensor& lora_a, const Tensor& lora_b, const Tensor& c,
                                      const OptTensor& z, const Tensor& h, double scaling,
                                      std::array<bool, 4> needs) {
  const auto dtype = dy.scalar_type();
  const int64_t rank = lora_a.size(0);
  const auto from = unscale_shrink_outer(dy, c, needs[3] ? *z : Tensor(), pack(lora_b, dtype),
                                         pack(h, dtype), scaling);
  std::vector<Tensor> grads;
  if (needs[0]) {
    const Way way = way_for(Op::kDoraBackward, dy, weight, lora_a);
    grads.push_back(
        lora_linear_grad_x(way, from.dz, weight, from.shrunk, lora_a, std::nullopt, 0.0));
  }
  if (needs[1]) {
    const Tensor da = outer({*x, std::nullopt, 0.0}, from.shrunk, 1.0);
    grads.push_back(unpack_transposed(da, rank, lora_a.scalar_type()));
  }
  grads.push_back(unpack(from.outer, rank, lora_b.scalar_type()));
  if (needs[3]) grads.push_back(from.sums);
  return grads;
}

// The same for any of them, and with dropout: c goes to the rows of B, and of dB.
std::vector<Tensor> grads_in_turn(const Tensor& dy, const OptTensor& x, const Tensor& weight,
                                  const Tensor& lora_a, const Tensor& lora_b, const Tensor& c,
                                  const OptTensor& z, const OptTensor& h, const OptTensor& mask,
                                  double scaling, double p, std::array<bool, 4> needs) {
  const auto [needs_x, needs_a, needs_b, needs_scale] = needs;
  const Way way = way_for(Op::kDoraBackward, dy, weight, lora_a);
  const bool drops = has(mask), few = drops && sparse(dy, weight, p);
  const bool needs_branch = needs_x || needs_a || needs_b;
  Tensor factor = drops ? c.sub(1).mul_(1.0 / (1.0 - p)) : c;
  if (few) factor.add_(1);  // what a kept element of x sees of dY W
  const auto [dz, sums] =
      unscaled(dy, factor, drops ? needs_x : needs_branch, needs_scale ? z : std::nullopt);
  std::vector<Tensor> grads;
  if (needs_branch && drops) {
    grads = lora_linear_backward(dy, x, std::nullopt, lora_a,
                                 lora_b.to(c.scalar_type()) * c.unsqueeze(1), h, std::nullopt, mask,
                                 scaling, p, false, {needs_x, needs_a, needs_b, false, false});
    if (needs_x && few) {
      accumulate_product(way, grads[0], dz, weight);
      replace_dropped(grads[0], dy, *mask, weight);
    } else if (needs_x) {
      add_kept(grads[0], product(way, dz, weight), *mask);
      accumulate_product(way, grads[0], dy, weight);
    }
    if (needs_b) grads.back() = grads.back().mul_(c.unsqueeze(1)).to(lora_b.scalar_type());
  } else if (needs_branch) {
    grads = lora_linear_backward(dz, x, weight, lora_a, lora_b, h, std::nullopt, std::nullopt,
                                 scaling, 0.0, false, {needs_x, needs_a, needs_b, false, false});
  }
  if (needs_scale) grads.push_back(sums);
  return grads;
}

}  // namespace

std::vector<Tensor> dora_linear_backward(const Tensor& dy, const OptTensor& x, const Tensor& weight,
                                         const Tensor& lora_a, const Tensor& lora_b,
                                         const Tensor& scale, const OptTensor& z,
                                         const OptTensor& h, const OptTensor& mask, double scaling,
                                         double dropout_p, std::array<bool, 4> needs) {
  const Tensor c = vector_of(scale, dy.scalar_type());
  const bool together = !has(mask) && needs[2] && (needs[0] || needs[1]);
  auto grads = together ? grads_in_one_pass(dy, x, weight, lora_a, lora_b, c, z, *h, scaling, needs)
                        : grads_in_turn(dy, x, weight, lora_a, lora_b, c, z, h, mask, scaling,
                                        dropout_p, needs);
  if (needs[3]) grads.back() = grads.back().to(scale.scalar_type());
  return grads;
}

}  // namespace lora_kernels
