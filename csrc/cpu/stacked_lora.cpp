// A rank of A lies along x: a dot. B's ranks lie side by side: a block of it is turned in a buffer,
// and its columns are added up rank by rank, so that a row's sum does not depend on how many rows
// there are.
#include "stacked_lora.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "gather_pass.h"
#include "math_type.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

// Rows of a stack that one task works on: few long ones of A, many short ones of B.
constexpr int64_t kRanks = 4, kColumns = 256;

// Which rows use which adapter. Tensors of a server may be longer than what they hold.
struct Segments {
  Tensor order, starts, counts, ids, ranks;
  int64_t max_rank;

  int64_t size() const { return ids.numel(); }
  int64_t id(int64_t i) const { return ids.const_data_ptr<int32_t>()[i]; }
  // None for an adapter of rank 0, whose rows stay as they are.
  int64_t count(int64_t i) const {
    return id(i) < 0 || rank(i) == 0 ? 0 : counts.const_data_ptr<int32_t>()[i];
  }
  int64_t rank(int64_t i) const {
    return ranks.defined() ? ranks.const_data_ptr<int32_t>()[id(i)] : max_rank;
  }
  const int32_t* slots(int64_t i) const {
    return order.const_data_ptr<int32_t>() + starts.const_data_ptr<int32_t>()[i];
  }
};

std::vector<int32_t> counting(int64_t size) {
  std::vector<int32_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

Segments segments_of(const OptTensor& order, const Tensor& starts, const Tensor& counts,
                     const Tensor& ids, const OptTensor& ranks, int64_t max_rank, int64_t rows) {
  const auto plain = [](const Tensor& t) { return t.to(at::kInt).contiguous(); };
  return {has(order) ? plain(*order) : at::arange(rows, at::kInt),
          plain(starts),
          plain(counts),
          plain(ids),
          has(ranks) ? plain(*ranks) : Tensor(),
          max_rank};
}

// Calls run(slice, segment, first, last) for pieces of extent(slice, segment), on all threads.
template <typename Extent, typename Run>
void for_pieces(int64_t slices, const Segments& segments, int64_t size, Extent extent, Run run) {
  struct Piece {
    int64_t slice, segment, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < slices; ++s) {
    for (int64_t i = 0; i < segments.size(); ++i) {
      const int64_t end = segments.count(i) > 0 ? extent(s, i) : 0;
      for (int64_t first = 0; first < end; first += size) {
        pieces.push_back({s, i, first, std::min(first + size, end)});
      }
    }
  }
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(pieces[i].slice, pieces[i].segment, pieces[i].first, pieces[i].last);
    }
  });
}

// The part of a stack from row `skip` of an adapter on.
const void* part(const Tensor& stack, int64_t adapter, int64_t skip) {
  const int64_t begin = adapter * stack.stride(0) + skip * stack.stride(1);
  return static_cast<const char*>(stack.const_data_ptr()) + begin * stack.element_size();
}

template <typename Math>
Rows<Math> rows_of(const Segments& segments, int64_t i, const Math* rows, int64_t stride) {
  return {rows, stride, segments.slots(i), segments.count(i), 1};
}

// y[row, n] += sum over r of h[row, r] stack[adapter, n, r] for n in [first, last); what was in y
// is lost where `add` is not set. `to` is y from the column of n = 0 on.
template <typename Math>
void add_up(const Segments& segments, int64_t i, const Rows<Math>& h, const Tensor& stack,
            const int32_t* index, int64_t first, int64_t last, Target to, bool add) {
  const int64_t width = last - first, rank = segments.rank(i), stride = stack.stride(1);
  const int64_t itemsize = bytes(to.storage);
  std::vector<Math> memory((rank + kTile) * width);
  turn(part(stack, segments.id(i), first), storage_of(stack.scalar_type()), stride, rank, width,
       memory.data());
  const Storage kept = sizeof(Math) == sizeof(double) ? Storage::kDouble : Storage::kFloat;
  const Pages pages = {memory.data(), kept, width, width, index};
  to.data = static_cast<char*>(to.data) + first * itemsize;
  for (int64_t j = 0; j < h.count && !add; ++j) {
    std::memset(static_cast<char*>(to.data) + h.slots[j] * to.stride * itemsize, 0,
                width * itemsize);
  }
  mix_add(h, pages, Mix<Math>{h.data, h.stride, rank, memory.data() + rank * width, 0}, {0, width},
          to);
}

// As the loops read it: the last dimension dense, and of the type that is summed in where that is
// double.
Tensor readable(const Tensor& tensor, at::ScalarType math) {
  const Tensor typed = math == at::kDouble ? tensor.to(math) : tensor;
  return typed.stride(-1) == 1 || typed.size(-1) <= 1 ? typed : typed.contiguous();
}

// h [slices, rows, max_rank] in the type summed in, zero where there is no adapter or no rank.
Tensor shrink(const Tensor& x, at::TensorList lora_a, const Segments& segments, int64_t slices) {
  const auto math = math_of(x.scalar_type());
  const Tensor rows = readable(x.to(math), math);
  const Tensor h = at::zeros({slices, x.size(0), segments.max_rank}, rows.options());
  const std::vector<int32_t> index = counting(segments.max_rank);
  const bool packed = segments.ranks.defined();
  std::vector<Tensor> stacks;
  for (const Tensor& stack : lora_a) stacks.push_back(readable(stack, math));
  for_pieces(
      slices, segments, kRanks, [&](int64_t, int64_t i) { return segments.rank(i); },
      [&](int64_t s, int64_t i, int64_t first, int64_t last) {
        const Tensor& stack = stacks[packed ? 0 : s];
        const int64_t skip = packed ? s * segments.rank(i) : 0;
        const Pages pages = {part(stack, segments.id(i), skip), storage_of(stack.scalar_type()),
                             stack.stride(1), stack.size(2), index.data()};
        in_math(math, [&](auto kind) {
          using Math = decltype(kind);
          dots(rows_of(segments, i, rows.const_data_ptr<Math>(), rows.stride(0)), pages, first,
               last, h.mutable_data_ptr<Math>() + s * h.stride(0), h.stride(1));
        });
      });
  return h;
}

// Row by row h[slice, row] *= its adapter's factor.
void scale(const Tensor& h, const Segments& segments, const Tensor& scalings) {
  const Tensor factors = scalings.to(at::kDouble).contiguous();
  in_math(h.scalar_type(), [&](auto kind) {
    using Math = decltype(kind);
    for (int64_t i = 0; i < segments.size(); ++i) {
      for (int64_t j = 0; j < segments.count(i); ++j) {
        const auto factor = static_cast<Math>(factors.const_data_ptr<double>()[segments.id(i)]);
        for (int64_t s = 0; s < h.size(0); ++s) {
          auto* row =
              h.mutable_data_ptr<Math>() + s * h.stride(0) + segments.slots(i)[j] * h.stride(1);
          std::for_each(row, row + h.size(2), [&](Math& value) { value *= factor; });
        }
      }
    }
  });
}

void expand(const Tensor& h, at::TensorList lora_b, const Segments& segments, int64_t offset,
            bool add, const Tensor& y) {
  const auto math = h.scalar_type();
  // As the loops write it.
  const bool direct =
      has_dense_rows(y) && (y.scalar_type() == at::kDouble) == (math == at::kDouble);
  const Tensor sums = direct ? y : y.to(math).contiguous();
  const Storage storage = storage_of(sums.scalar_type());
  const std::vector<int32_t> index = counting(segments.max_rank);
  auto* to = static_cast<char*>(sums.mutable_data_ptr()) + offset * sums.element_size();
  std::vector<Tensor> stacks;
  std::vector<Target> targets;
  for (const Tensor& stack : lora_b) {
    stacks.push_back(readable(stack, math));
    targets.push_back({to, storage, sums.stride(0)});
    to += stack.size(1) * sums.element_size();
  }
  for_pieces(
      stacks.size(), segments, kColumns, [&](int64_t s, int64_t) { return stacks[s].size(1); },
      [&](int64_t s, int64_t i, int64_t first, int64_t last) {
        in_math(math, [&](auto kind) {
          const auto* own = h.const_data_ptr<decltype(kind)>() + s * h.stride(0);
          add_up(segments, i, rows_of(segments, i, own, h.stride(1)), stacks[s], index.data(),
                 first, last, targets[s], add);
        });
      });
  if (!direct) y.copy_(sums);
}

}  // namespace

void stacked_lora_shrink(const Tensor& x, at::TensorList lora_a, const Tensor& order,
                         const Tensor& starts, const Tensor& counts, const Tensor& ids,
                         const Tensor&, double scaling, const Tensor& h) {
  const Segments segments =
      segments_of(order, starts, counts, ids, {}, lora_a[0].size(1), x.size(0));
  h.copy_(shrink(x, lora_a, segments, lora_a.size()).mul_(scaling));
}

void stacked_lora_expand(const Tensor& h, at::TensorList lora_b, const Tensor& order,
                         const Tensor& starts, const Tensor& counts, const Tensor& ids,
                         int64_t offset, bool add, const Tensor& y) {
  const Segments segments = segments_of(order, starts, counts, ids, {}, h.size(2), h.size(1));
  expand(h.to(math_of(h.scalar_type())).contiguous(), lora_b, segments, offset, add, y);
}

void stacked_lora_linear(const Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
                         const OptTensor& order, const Tensor& starts, const Tensor& counts,
                         const Tensor& ids, const OptTensor& ranks, const OptTensor& scalings,
                         double scaling, int64_t offset, bool add, const Tensor& y) {
  const int64_t slices = lora_b.size();
  const int64_t max_rank = lora_a[0].size(1) / (has(ranks) ? slices : 1);
  const Segments segments = segments_of(order, starts, counts, ids, ranks, max_rank, x.size(0));
  const Tensor h = shrink(x, lora_a, segments, slices);
  if (scaling != 1.0) h.mul_(scaling);
  if (has(scalings)) scale(h, segments, *scalings);
  expand(h, lora_b, segments, offset, add, y);
}

}  // namespace lora_kernels
