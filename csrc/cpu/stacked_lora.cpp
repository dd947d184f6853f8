// A rank of A lies along x: a dot. B's ranks lie side by side: a block of it is turned in a buffer,
// and its columns are added up rank by rank, so that a row's sum does not depend on how many rows
// there are.
#include "stacked_lora.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "gather_pass.h"
#include "math_type.h"

namespace lora_kernels {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Rows of a stack that one task works on: few long ones of A, many short ones of B.
constexpr int64_t kRanks = 4, kColumns = 256;

bool has(const OptTensor& tensor) { return tensor.has_value() && tensor->defined(); }

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

Tensor counting(int64_t size) { return at::arange(size, at::kInt); }

Segments segments_of(const OptTensor& order, const Tensor& starts, const Tensor& counts,
                     const Tensor& ids, const OptTensor& ranks, int64_t max_rank, int64_t rows) {
  const auto plain = [](const Tensor& t) { return t.to(at::kInt).contiguous(); };
  return {has(order) ? plain(*order) : counting(rows), plain(starts), plain(counts), plain(ids),
          has(ranks) ? plain(*ranks) : Tensor(),       max_rank};
}

// Calls run(segment, first, last) for pieces of extent(segment), on all threads.
template <typename Extent, typename Run>
void for_pieces(const Segments& segments, int64_t size, Extent extent, Run run) {
  struct Piece {
    int64_t segment, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < segments.size(); ++i) {
    const int64_t end = segments.count(i) > 0 ? extent(i) : 0;
    for (int64_t first = 0; first < end; first += size) {
      pieces.push_back({i, first, std::min(first + size, end)});
    }
  }
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(pieces[i].segment, pieces[i].first, pieces[i].last);
    }
  });
}

// One product of the rows of each segment with its adapter's part of a stack.
struct Product {
  const Tensor &rows, &stack, &out;

  const void* part(int64_t adapter, int64_t skip) const {
    const int64_t begin = adapter * stack.stride(0) + skip * stack.stride(1);
    return static_cast<const char*>(stack.const_data_ptr()) + begin * stack.element_size();
  }
  Storage storage() const { return storage_of(stack.scalar_type()); }
};

template <typename Math>
Rows<Math> rows_of(const Segments& segments, int64_t i, const Tensor& rows) {
  return {rows.const_data_ptr<Math>(), rows.stride(0), segments.slots(i), segments.count(i), 1};
}

// out[row, r] = rows[row] . stack[adapter, skip + r] for r in [first, last).
template <typename Math>
void multiply(const Segments& segments, int64_t i, const Product& what, int64_t skip,
              const int32_t* index, int64_t first, int64_t last) {
  const Pages pages = {what.part(segments.id(i), skip), what.storage(), what.stack.stride(1),
                       what.stack.size(2), index};
  dots(rows_of<Math>(segments, i, what.rows), pages, first, last, what.out.mutable_data_ptr<Math>(),
       what.out.stride(0));
}

// out[row, n] = sum over r of rows[row, r] stack[adapter, n, r] for n in [first, last).
template <typename Math>
void add_up(const Segments& segments, int64_t i, const Product& what, const int32_t* index,
            int64_t first, int64_t last) {
  const int64_t width = last - first, rank = segments.rank(i), stride = what.stack.stride(1);
  std::vector<Math> turned(rank * width);
  turn(what.part(segments.id(i), first), what.storage(), stride, rank, width, turned.data());
  const Storage kept = sizeof(Math) == sizeof(double) ? Storage::kDouble : Storage::kFloat;
  const Pages pages = {turned.data(), kept, width, width, index};
  const Mix<Math> sum = {what.rows.const_data_ptr<Math>(), what.rows.stride(0), rank,
                         what.out.mutable_data_ptr<Math>() + first, what.out.stride(0)};
  mix(rows_of<Math>(segments, i, what.rows), pages, sum, {0, width});
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
  const Tensor index = counting(segments.max_rank);
  for (int64_t s = 0; s < slices; ++s) {
    const bool packed = segments.ranks.defined();
    const Tensor stack = readable(lora_a[packed ? 0 : s], math), out = h[s];
    for_pieces(
        segments, kRanks, [&](int64_t i) { return segments.rank(i); },
        [&](int64_t i, int64_t first, int64_t last) {
          const int64_t skip = packed ? s * segments.rank(i) : 0;
          in_math(math, [&](auto kind) {
            multiply<decltype(kind)>(segments, i, {rows, stack, out}, skip,
                                     index.const_data_ptr<int32_t>(), first, last);
          });
        });
  }
  return h;
}

// Rows that have an adapter, [rows, 1].
Tensor live_rows(const Segments& segments, int64_t rows) {
  const Tensor live = at::zeros({rows, 1}, at::kBool);
  for (int64_t i = 0; i < segments.size(); ++i) {
    for (int64_t j = 0; j < segments.count(i); ++j) {
      live.mutable_data_ptr<bool>()[segments.slots(i)[j]] = true;
    }
  }
  return live;
}

void expand(const Tensor& h, at::TensorList lora_b, const Segments& segments, int64_t offset,
            bool add, const Tensor& y) {
  const auto math = h.scalar_type();
  const Tensor live = live_rows(segments, h.size(1));
  for (size_t s = 0; s < lora_b.size(); ++s) {
    const Tensor stack = readable(lora_b[s], math), rows = h[s];
    const int64_t width = stack.size(1);
    const Tensor delta = at::zeros({h.size(1), width}, h.options());
    const Tensor index = counting(segments.max_rank);
    for_pieces(
        segments, kColumns, [&](int64_t) { return width; },
        [&](int64_t i, int64_t first, int64_t last) {
          in_math(math, [&](auto kind) {
            add_up<decltype(kind)>(segments, i, {rows, stack, delta},
                                   index.const_data_ptr<int32_t>(), first, last);
          });
        });
    Tensor part = y.narrow(1, offset, width);
    const Tensor sum = add ? delta.add_(part) : delta;
    part.copy_(at::where(live, sum.to(y.scalar_type()), part));
    offset += width;
  }
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
  const Tensor h = shrink(x, lora_a, segments, slices).mul_(scaling);
  if (has(scalings)) {
    for (int64_t i = 0; i < segments.size(); ++i) {
      const Tensor own =
          at::from_blob(const_cast<int32_t*>(segments.slots(i)), {segments.count(i)}, at::kInt);
      if (segments.count(i) == 0) continue;
      const double factor = (*scalings)[segments.id(i)].item<double>();
      h.index_copy_(1, own.to(at::kLong), h.index_select(1, own).mul_(factor));
    }
  }
  expand(h, lora_b, segments, offset, add, y);
}

}  // namespace lora_kernels
