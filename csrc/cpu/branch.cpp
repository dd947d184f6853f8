#include "branch.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "activation_pass.h"
#include "dropout.h"
#include "math_type.h"
#include "scale_pass.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

// Below this many multiply-adds a task is not worth a thread.
constexpr int64_t kTask = 1 << 19;
// A short matrix is cut into row chunks until there are this many pieces to share out.
constexpr int64_t kPieces = 16;
// Rows that one chain of additions runs over; a longer one would round worse than a GEMM.
constexpr int64_t kChain = 512;
// Rows of a strip that are written and then read while they are in the cache.
constexpr int64_t kBlockRows = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t grain(int64_t work_each) {
  return std::max<int64_t>(1, kTask / std::max<int64_t>(1, work_each));
}

Activation activation(const Tensor& x, const std::optional<Tensor>& mask, double p) {
  const KeepBits keep = keep_bits(mask);
  return {x.const_data_ptr(), storage_of(x.scalar_type()), x.stride(0), keep.data, keep.stride,
          1.0 / (1.0 - p)};
}

// parts[0] += parts[1] + parts[2] + ..., one after the other, and times s.
template <typename Math>
void sum_parts(Math* parts, int64_t count, int64_t size, double scaling) {
  at::parallel_for(0, size, grain(count), [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = begin; i < end; ++i) parts[i] += parts[part * size + i];
    }
    for (int64_t i = begin; i < end && scaling != 1.0; ++i) parts[i] *= static_cast<Math>(scaling);
  });
}

// How an x [M, K] is cut into pieces: by columns, and by rows where that gives too few.
struct Cut {
  int64_t strips, chunks, rows_each;

  Cut(int64_t rows, int64_t cols, int64_t rank) {
    strips = std::max<int64_t>(1, ceil_div(cols, kStrip));
    const int64_t wanted = ceil_div(kPieces, strips);
    const int64_t worth = rows * std::min(cols, kStrip) * rank / kTask;
    rows_each = std::max<int64_t>(1, ceil_div(rows, std::clamp<int64_t>(worth, 1, wanted)));
    rows_each = std::min(rows_each, kChain);
    chunks = std::max<int64_t>(1, ceil_div(rows, rows_each));
  }
};

// A sum starts at zero where it is added to, while it is in the cache.
template <typename Math>
void clear(Math* sums, Range range, int64_t rank) {
  std::fill(sums + range.begin * rank, sums + range.end * rank, Math(0));
}

// Nothing to do before a piece of x is read.
struct Ready {
  void operator()(int64_t /*chunk*/, Range /*rows*/, Range /*cols*/) const {}
};

// before(chunk, rows, columns) makes the part of x that is read next.
template <typename Math, typename Before = Ready>
void pass(const Activation& x, int64_t rows, int64_t cols, const Cut& cut,
          const Products<Math>& whole, const Before& before = {}) {
  const int64_t step = std::is_same_v<Before, Ready> ? kChain : kBlockRows;
  const int64_t each = cut.rows_each * std::min(cols, kStrip) * whole.rank;
  at::parallel_for(0, cut.strips * cut.chunks, grain(each), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t strip = piece % cut.strips, chunk = piece / cut.strips;
      Products<Math> part = whole;
      const Range m = {std::min(chunk * cut.rows_each, rows),
                       std::min((chunk + 1) * cut.rows_each, rows)};
      const Range k = {strip * kStrip, std::min((strip + 1) * kStrip, cols)};
      part.outer += chunk * cols * part.rank;
      clear(part.outer, k, part.rank);
      if (part.shrunk) clear(part.shrunk += strip * rows * part.rank, m, part.rank);
      for (int64_t row = m.begin; row < m.end; row += step) {
        const Range block = {row, std::min(row + step, m.end)};
        before(chunk, block, k);
        accumulate(x, block, k, part);
      }
    }
  });
}

// The first [rows, cols] of `in`, transposed into `out`.
void transpose_into(const Tensor& in, Tensor& out, int64_t rows, int64_t cols) {
  in_math(in.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const auto* from = in.const_data_ptr<Math>();
    auto* to = out.mutable_data_ptr<Math>();
    at::parallel_for(0, cols, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, rows)),
                     [&](int64_t begin, int64_t end) {
                       transpose(from, in.stride(0), to, out.stride(0), rows, {begin, end});
                     });
  });
}

// Rows whose distance is a power of two would all fall into the same few lines of the cache.
Tensor staggered(const Tensor& factor, at::ScalarType math) {
  const int64_t rank = factor.size(0), cols = factor.size(1);
  Tensor rows = at::empty({rank, cols + kLanes}, factor.options().dtype(math));
  if (factor.stride(0) == 1 && factor.scalar_type() == math) {
    transpose_into(factor.t(), rows, cols, rank);
  } else {
    rows.narrow(1, 0, cols).copy_(factor);
  }
  return rows;
}

}  // namespace

Tensor pack(const Tensor& matrix, at::ScalarType dtype) {
  const auto math = math_of(dtype);
  const int64_t rank = matrix.size(1), padded = padded_rank(rank);
  if (rank == padded && matrix.scalar_type() == math && matrix.is_contiguous()) return matrix;
  Tensor packed = at::empty({matrix.size(0), padded}, matrix.options().dtype(math));
  if (rank != padded) packed.zero_();
  packed.narrow(1, 0, rank).copy_(matrix);
  return packed;
}

Tensor pack_transposed(const Tensor& matrix, at::ScalarType dtype) {
  const auto math = math_of(dtype);
  const Tensor source = with_dense_rows(matrix.to(math));
  const int64_t rank = source.size(0), cols = source.size(1), padded = padded_rank(rank);
  Tensor packed = at::empty({cols, padded}, source.options());
  if (rank != padded) packed.zero_();
  transpose_into(source, packed, rank, cols);
  return packed;
}

Tensor unpack_transposed(const Tensor& packed, int64_t rank, at::ScalarType dtype) {
  Tensor matrix = at::empty({rank, packed.size(0)}, packed.options());
  transpose_into(packed, matrix, packed.size(0), rank);
  return matrix.to(dtype);
}

Tensor unpack(const Tensor& packed, int64_t rank, at::ScalarType dtype) {
  if (packed.size(1) == rank) return packed.to(dtype);
  // An empty slice calls itself contiguous whatever its strides, so it is copied into a new one.
  return at::empty({packed.size(0), rank}, packed.options().dtype(dtype))
      .copy_(packed.narrow(1, 0, rank));
}

Tensor shrink(const Dropped& x, const Tensor& factor) {
  const Tensor dense = with_dense_rows(x.x);
  const int64_t rows = dense.size(0), cols = dense.size(1), rank = factor.size(1);
  Tensor shrunk = at::empty({rows, rank}, factor.options());
  const Activation in = activation(dense, x.mask, x.p);
  in_math(factor.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Products<Math> products = {rank, factor.const_data_ptr<Math>(),
                                     shrunk.mutable_data_ptr<Math>(), nullptr, nullptr};
    at::parallel_for(0, rows, grain(cols * rank), [&](int64_t begin, int64_t end) {
      clear(products.shrunk, {begin, end}, rank);
      accumulate(in, {begin, end}, {0, cols}, products);
    });
  });
  return shrunk;
}

Tensor outer(const Dropped& x, const Tensor& vectors, double scaling) {
  const Tensor dense = with_dense_rows(x.x);
  const int64_t rows = dense.size(0), cols = dense.size(1), rank = vectors.size(1);
  const Cut cut(rows, cols, rank);
  Tensor parts = at::empty({cut.chunks, cols, rank}, vectors.options());
  in_math(vectors.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Products<Math> products = {rank, nullptr, nullptr, vectors.const_data_ptr<Math>(),
                                     parts.mutable_data_ptr<Math>()};
    pass(activation(dense, x.mask, x.p), rows, cols, cut, products);
    sum_parts(products.outer, cut.chunks, cols * rank, scaling);
  });
  return parts[0];
}

std::pair<Tensor, Tensor> shrink_outer(const Tensor& x, const Tensor& factor, const Tensor& vectors,
                                       double scaling) {
  const Tensor dense = with_dense_rows(x);
  const int64_t rows = dense.size(0), cols = dense.size(1), rank = factor.size(1);
  const Cut cut(rows, cols, rank);
  Tensor shrunk = at::empty({cut.strips, rows, rank}, factor.options());
  Tensor outer = at::empty({cut.chunks, cols, rank}, factor.options());
  in_math(factor.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Products<Math> products = {
        rank, factor.const_data_ptr<Math>(), shrunk.mutable_data_ptr<Math>(),
        vectors.const_data_ptr<Math>(), outer.mutable_data_ptr<Math>()};
    pass(activation(dense, std::nullopt, 0.0), rows, cols, cut, products);
    sum_parts(products.shrunk, cut.strips, rows * rank, scaling);
    sum_parts(products.outer, cut.chunks, cols * rank, scaling);
  });
  return {shrunk[0], outer[0]};
}

UnscaledProducts unscale_shrink_outer(const Tensor& dy_in, const Tensor& scale, const Tensor& z,
                                      const Tensor& factor, const Tensor& vectors, double scaling) {
  const Tensor dy = with_dense_rows(dy_in);
  const int64_t rows = dy.size(0), cols = dy.size(1), rank = factor.size(1);
  const Cut cut(rows, cols, rank);
  UnscaledProducts from = {at::empty({rows, cols}, dy.options()),
                           at::empty({cut.strips, rows, rank}, factor.options()),
                           at::empty({cut.chunks, cols, rank}, factor.options()),
                           at::zeros({cut.chunks, cols}, factor.options())};
  in_math(factor.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Products<Math> products = {
        rank, factor.const_data_ptr<Math>(), from.shrunk.mutable_data_ptr<Math>(),
        vectors.const_data_ptr<Math>(), from.outer.mutable_data_ptr<Math>()};
    Math* sums = z.defined() ? from.sums.mutable_data_ptr<Math>() : nullptr;
    const Unscaling<Math> unscaling = {matrix_of(dy), scale.const_data_ptr<Math>(),
                                       matrix_of(from.dz), matrix_of(z), sums};
    pass(activation(from.dz, std::nullopt, 0.0), rows, cols, cut, products,
         [&](int64_t chunk, Range block, Range strip) {
           Unscaling<Math> part = unscaling;
           if (sums) part.sums += chunk * cols;
           run(part, block, strip);
         });
    sum_parts(products.shrunk, cut.strips, rows * rank, scaling);
    sum_parts(products.outer, cut.chunks, cols * rank, scaling);
    if (sums) sum_parts(sums, cut.chunks, cols, 1.0);
  });
  return {from.dz, from.shrunk[0], from.outer[0], from.sums[0]};
}

void expand_into(const Tensor& out, const Tensor& vectors, const Tensor& factor,
                 const std::optional<Tensor>& mask, double scaling, bool add) {
  const int64_t rows = out.size(0), rank = factor.size(0), cols = factor.size(1);
  const Tensor padded = staggered(factor, vectors.scalar_type());
  const KeepBits keep = keep_bits(mask);
  in_math(vectors.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Expansion<Math> expansion = {rank,
                                       vectors.const_data_ptr<Math>(),
                                       vectors.stride(0),
                                       padded.const_data_ptr<Math>(),
                                       cols + kLanes,
                                       cols,
                                       out.mutable_data_ptr(),
                                       storage_of(out.scalar_type()),
                                       keep.data,
                                       keep.stride,
                                       static_cast<Math>(scaling),
                                       add};
    at::parallel_for(0, rows, grain(cols * rank),
                     [&](int64_t begin, int64_t end) { expand(expansion, {begin, end}); });
  });
}

Tensor expand_dropped(const Tensor& vectors, const Tensor& lora_a, const Tensor& mask, double p,
                      at::ScalarType dtype) {
  Tensor out = at::empty({vectors.size(0), lora_a.size(1)}, vectors.options().dtype(dtype));
  expand_into(out, vectors, lora_a, mask, 1.0 / (1.0 - p), false);
  return out;
}

Tensor row_norms(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
  const Tensor dense = with_dense_rows(weight);
  const int64_t rows = dense.size(0), cols = dense.size(1), rank = lora_a.size(0);
  const auto math_dtype = math_of(weight.scalar_type());
  const Tensor vectors = lora_b.to(math_dtype).mul(scaling).contiguous();
  const Tensor factor = staggered(lora_a, math_dtype);
  Tensor out = at::empty({rows}, dense.options().dtype(math_dtype));
  in_math(math_dtype, [&](auto math) {
    using Math = decltype(math);
    Expansion<Math> expansion = {};
    expansion.rank = rank;
    expansion.vectors = vectors.const_data_ptr<Math>();
    expansion.vector_stride = rank;
    expansion.factor = factor.const_data_ptr<Math>();
    expansion.factor_stride = cols + kLanes;
    expansion.cols = cols;
    const Norms<Math> each = {activation(dense, std::nullopt, 0.0), expansion,
                              out.mutable_data_ptr<Math>()};
    at::parallel_for(0, rows, grain(cols * (rank + 1)),
                     [&](int64_t begin, int64_t end) { norms(each, {begin, end}); });
  });
  return out;
}

}  // namespace lora_kernels
