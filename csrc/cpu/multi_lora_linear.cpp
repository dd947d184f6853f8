// The large loops are gather_pass.h's; here are the tensors, the threads and the order of things.
#include "multi_lora_linear.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "dropout.h"
#include "gather_pass.h"
#include "math_type.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

// Columns of one task of a product that adds multiples of rows.
constexpr int64_t kColumns = 1024;

// Which slots belong to which adapter, and which pages are whose.
struct Batch {
  const int32_t *pages, *spans, *order, *offsets;
  int64_t adapters, slots, slots_per_row;

  Batch(const Tensor& pages, const Tensor& spans, const Slots& which, int64_t rows)
      : pages(pages.const_data_ptr<int32_t>()),
        spans(spans.const_data_ptr<int32_t>()),
        order(which.order),
        offsets(which.offsets),
        adapters(spans.size(0)),
        slots(which.count),
        slots_per_row(rows == 0 ? 1 : which.count / rows) {}

  int64_t rank(int64_t adapter) const { return spans[2 * adapter + 1]; }
  const int32_t* own_pages(int64_t adapter) const { return pages + spans[2 * adapter]; }
  int64_t count(int64_t adapter) const { return offsets[adapter + 1] - offsets[adapter]; }

  template <typename Math>
  Rows<Math> rows(int64_t adapter, const Tensor& data, int64_t per_row) const {
    return {data.const_data_ptr<Math>(), data.stride(0), order + offsets[adapter], count(adapter),
            per_row};
  }
};

Slots slots_of(const Tensor& order, const Tensor& offsets) {
  return {order.const_data_ptr<int32_t>(), offsets.const_data_ptr<int32_t>(), order.numel()};
}

// A part of the work on one linear: some adapters, and some of their pages or columns.
struct Piece {
  int64_t linear, first_adapter, last_adapter, first, last;
};

// Calls run(piece) for all of them on all threads, each thread taking the next when it is free:
// nothing that is computed depends on who takes what.
template <typename Run>
void for_each_piece(const std::vector<Piece>& pieces, Run run) {
  const int64_t count = pieces.size();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) run(pieces[i]);
  });
}

// Appends pieces of `size` of each adapter that has work in linear `linear`.
template <typename Extent>
void add_pieces(std::vector<Piece>& pieces, const Batch& batch, int64_t linear, int64_t size,
                Extent extent) {
  for (int64_t adapter = 0; adapter < batch.adapters; ++adapter) {
    const int64_t end = batch.count(adapter) > 0 ? extent(adapter) : 0;
    for (int64_t first = 0; first < end; first += size) {
      pieces.push_back({linear, adapter, adapter + 1, first, std::min(first + size, end)});
    }
  }
}

// Calls run(adapter, first, last) for pieces of `size` of each adapter that has work, on all
// threads.
template <typename Extent, typename Run>
void for_pieces(const Batch& batch, int64_t size, Extent extent, Run run) {
  std::vector<Piece> pieces;
  add_pieces(pieces, batch, 0, size, extent);
  for_each_piece(pieces, [&](const Piece& p) { run(p.first_adapter, p.first, p.last); });
}

// Pages of one piece: more where there are adapters enough for all threads, since rows are then
// read once for all of them.
int64_t pages_at_once(const Batch& batch) {
  int64_t busy = 0;
  for (int64_t adapter = 0; adapter < batch.adapters; ++adapter) busy += batch.count(adapter) > 0;
  return busy >= 2 * at::get_num_threads() ? 4 * kTile : kTile;
}

Pages pages_of(const Tensor& data, const int32_t* index) {
  return {data.const_data_ptr(), storage_of(data.scalar_type()), data.stride(0), data.size(1),
          index};
}

// Pages as the loops read them: unit stride, and of the type that is summed in where that is
// double.
Tensor readable(const Tensor& pages, at::ScalarType math) {
  const Tensor typed = math == at::kDouble ? pages.to(math) : pages;
  return with_dense_rows(typed);
}

// h[slot, r] = rows . page r, [slots, max_rank] and zero beyond the adapter's rank.
Tensor shrink_rows(const Tensor& rows, int64_t per_row, const Tensor& pages, const Batch& batch,
                   int64_t max_rank) {
  Tensor h = at::zeros({batch.slots, max_rank}, rows.options());
  in_math(rows.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    auto* out = h.mutable_data_ptr<Math>();
    for_pieces(
        batch, pages_at_once(batch), [&](int64_t a) { return batch.rank(a); },
        [&](int64_t a, int64_t first, int64_t last) {
          dots(batch.rows<Math>(a, rows, per_row), pages_of(pages, batch.own_pages(a)), first, last,
               out, max_rank);
        });
  });
  return h;
}

// out[slot] = sum of vectors[slot, r] page r; zero where a slot has no adapter.
Tensor expand_slots(const Tensor& vectors, const Tensor& pages, const Batch& batch) {
  const int64_t cols = pages.size(1);
  Tensor out = at::empty({batch.slots, cols}, vectors.options());
  in_math(vectors.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    auto* to = out.mutable_data_ptr<Math>();
    const int32_t assigned = batch.offsets[batch.adapters];
    for (int64_t i = 0; i < batch.slots; ++i) {
      const bool none = i < batch.offsets[0] || i >= assigned;
      if (none) std::fill_n(to + batch.order[i] * cols, cols, Math(0));
    }
    for_pieces(
        batch, kColumns, [&](int64_t) { return cols; },
        [&](int64_t a, int64_t first, int64_t last) {
          const Mix<Math> what = {vectors.const_data_ptr<Math>(), vectors.stride(0), batch.rank(a),
                                  to, cols};
          mix(batch.rows<Math>(a, vectors, 1), pages_of(pages, batch.own_pages(a)), what,
              {first, last});
        });
  });
  return out;
}

// Columns of one task of a product that adds up each row's slots: few, so that all threads have
// some and the rows' part of them stays in the cache while one adapter after the other adds to it.
constexpr int64_t kSharedColumns = 256;

// out[row] = sum over the row's slots of what expand_slots() gives, which is not formed.
Tensor expand_rows(const Tensor& vectors, const Tensor& pages, const Batch& batch) {
  if (batch.slots_per_row == 1) return expand_slots(vectors, pages, batch);
  const int64_t cols = pages.size(1);
  Tensor out = at::zeros({batch.slots / batch.slots_per_row, cols}, vectors.options());
  std::vector<Piece> pieces;
  for (int64_t first = 0; first < cols; first += kSharedColumns) {
    pieces.push_back({0, 0, batch.adapters, first, std::min(first + kSharedColumns, cols)});
  }
  in_math(vectors.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Target to = {out.mutable_data_ptr<Math>(), storage_of(out.scalar_type()), cols};
    for_each_piece(pieces, [&](const Piece& p) {
      Math sums[kTile * kSharedColumns];
      for (int64_t a = p.first_adapter; a < p.last_adapter; ++a) {
        const Mix<Math> what = {vectors.const_data_ptr<Math>(), vectors.stride(0), batch.rank(a),
                                sums, 0};
        mix_add(batch.rows<Math>(a, vectors, batch.slots_per_row),
                pages_of(pages, batch.own_pages(a)), what, {p.first, p.last}, to);
      }
    });
  });
  return out;
}

// Gradient of `like`: page r of an adapter is the sum over its slots of vectors[slot, r]
// rows[slot].
Tensor grad_pages(const Tensor& vectors, const Tensor& rows, int64_t per_row, const Tensor& like,
                  const Batch& batch) {
  const int64_t cols = like.size(1);
  Tensor out = at::zeros({like.size(0), cols}, vectors.options());
  in_math(vectors.scalar_type(), [&](auto math) {
    using Math = decltype(math);
    const Mix<Math> what = {vectors.const_data_ptr<Math>(), vectors.stride(0), 0,
                            out.mutable_data_ptr<Math>(), cols};
    for_pieces(
        batch, pages_at_once(batch), [&](int64_t a) { return batch.rank(a); },
        [&](int64_t a, int64_t first, int64_t last) {
          outer_pages(batch.rows<Math>(a, rows, per_row), batch.own_pages(a), first, last, what,
                      {0, cols});
        });
  });
  return out.to(like.scalar_type());
}

// The branch's input as the loops read it: a row per slot where each drops its own elements.
struct Input {
  Tensor rows;
  int64_t per_row;
};

Input branch_input(const Tensor& x, const OptTensor& mask, const Batch& batch) {
  const Tensor wide = x.to(math_of(x.scalar_type()));
  if (!has(mask)) return {readable(wide, wide.scalar_type()), batch.slots_per_row};
  const Tensor each =
      batch.slots_per_row == 1 ? wide : wide.repeat_interleave(batch.slots_per_row, 0);
  return {dropped(each, *mask), 1};
}

Tensor over_slots(const Tensor& slots, const Batch& batch) {
  if (batch.slots_per_row == 1) return slots;
  return slots.view({-1, batch.slots_per_row, slots.size(1)}).sum(1);
}

Tensor column(const Tensor& per_slot, const Tensor& like) {
  return per_slot.reshape({-1, 1}).to(like.scalar_type());
}

// One of the linears that share x, for multi_lora_linear_add().
template <typename Math>
struct Linear {
  Batch batch;
  Tensor a, b;
  const float *scalings, *weights;
  Math* h;
  int64_t max_rank;
  Target to;

  // h[slot, first:last] = c rows . pages, with c the adapter's scale and the slot's weight.
  void shrink(const Tensor& rows, int64_t adapter, int64_t first, int64_t last) const {
    const auto own = batch.rows<Math>(adapter, rows, batch.slots_per_row);
    dots(own, pages_of(a, batch.own_pages(adapter)), first, last, h, max_rank);
    for (int64_t i = 0; i < own.count; ++i) {
      const int64_t slot = own.slots[i];
      const Math coef = Math(scalings[adapter]) * (weights ? Math(weights[slot]) : Math(1));
      for (int64_t r = first; r < last; ++r) h[slot * max_rank + r] *= coef;
    }
  }

  void expand(int64_t adapter, Columns columns) const {
    Math sums[kTile * kColumns];
    const Rows<Math> slots = {h, max_rank, batch.order + batch.offsets[adapter],
                              batch.count(adapter), batch.slots_per_row};
    mix_add(slots, pages_of(b, batch.own_pages(adapter)),
            {h, max_rank, batch.rank(adapter), sums, 0}, columns, to);
  }
};

// Two adapters of one row add to the same columns, so there a piece has all adapters.
template <typename Math>
void add_expand_pieces(std::vector<Piece>& pieces, const Linear<Math>& linear, int64_t index) {
  const int64_t cols = linear.b.size(1);
  if (linear.batch.slots_per_row == 1) {
    const auto extent = [&](int64_t a) { return linear.batch.rank(a) > 0 ? cols : 0; };
    return add_pieces(pieces, linear.batch, index, kColumns, extent);
  }
  for (int64_t first = 0; first < cols; first += kColumns) {
    pieces.push_back({index, 0, linear.batch.adapters, first, std::min(first + kColumns, cols)});
  }
}

template <typename Math>
void run_all(const Tensor& rows, const std::vector<Linear<Math>>& linears) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < linears.size(); ++i) {
    const Batch& batch = linears[i].batch;
    add_pieces(pieces, batch, i, kTile, [&](int64_t a) { return batch.rank(a); });
  }
  for_each_piece(pieces, [&](const Piece& p) {
    linears[p.linear].shrink(rows, p.first_adapter, p.first, p.last);
  });
  pieces.clear();
  for (size_t i = 0; i < linears.size(); ++i) add_expand_pieces(pieces, linears[i], i);
  for_each_piece(pieces, [&](const Piece& p) {
    for (int64_t a = p.first_adapter; a < p.last_adapter; ++a) {
      linears[p.linear].expand(a, {p.first, p.last});
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> multi_lora_linear(const Tensor& x, const Tensor& a_pages,
                                             const Tensor& b_pages, const Tensor& pages,
                                             const Tensor& spans, const Tensor& coef,
                                             const Tensor& order, const Tensor& offsets,
                                             const Tensor&, const OptTensor& mask,
                                             const OptTensor& keep_scale, int64_t max_rank,
                                             bool keep_h) {
  const Batch batch(pages, spans, slots_of(order, offsets), x.size(0));
  const auto math = math_of(x.scalar_type());
  const Input in = branch_input(x, mask, batch);
  Tensor h = shrink_rows(in.rows, in.per_row, readable(a_pages, math), batch, max_rank);
  if (has(keep_scale)) h.mul_(column(*keep_scale, h));
  const Tensor delta = expand_rows(h * column(coef, h), readable(b_pages, math), batch);
  const Tensor kept = keep_h ? h.to(x.scalar_type()) : at::empty({0, max_rank}, x.options());
  return {delta.to(x.scalar_type()), kept};
}

std::vector<Tensor> multi_lora_linear_backward(
    const Tensor& dy, const OptTensor& x, const Tensor& a_pages, const Tensor& b_pages,
    const Tensor& pages, const Tensor& spans, const Tensor& coef, const Tensor& order,
    const Tensor& offsets, const Tensor&, const OptTensor& h, const OptTensor& mask,
    const OptTensor& keep_scale, int64_t max_rank, std::array<bool, 4> needs) {
  const auto [needs_x, needs_a, needs_b, needs_coef] = needs;
  const Batch batch(pages, spans, slots_of(order, offsets), dy.size(0));
  const auto math = math_of(dy.scalar_type());
  const Tensor rows = readable(dy.to(math), math);
  const Tensor wide_h = has(h) ? h->to(math) : Tensor();
  Tensor u, dh;
  if (needs_x || needs_a || needs_coef) {
    u = shrink_rows(rows, batch.slots_per_row, readable(b_pages, math), batch, max_rank);
    dh = u * column(coef, u);
    if (has(keep_scale)) dh.mul_(column(*keep_scale, dh));
  }
  std::vector<Tensor> grads;
  if (needs_x) {
    const Tensor pages_a = readable(a_pages, math);
    const Tensor dx = has(mask)
                          ? over_slots(dropped(expand_slots(dh, pages_a, batch), *mask), batch)
                          : expand_rows(dh, pages_a, batch);
    grads.push_back(dx.to(dy.scalar_type()));
  }
  if (needs_a) {
    const Input in = branch_input(*x, mask, batch);
    grads.push_back(grad_pages(dh, in.rows, in.per_row, a_pages, batch));
  }
  if (needs_b) {
    const Tensor vectors = wide_h * column(coef, wide_h);
    grads.push_back(grad_pages(vectors, rows, batch.slots_per_row, b_pages, batch));
  }
  if (needs_coef) grads.push_back((u * wide_h).sum(1).to(coef.scalar_type()).view_as(coef));
  return grads;
}

void add_deltas(const Tensor& y, const Tensor& x, const std::vector<AdapterStack>& stacks,
                const Tensor& weights, const Slots& slots, int64_t max_rank) {
  const auto math = math_of(x.scalar_type());
  const Tensor rows = readable(x.scalar_type() == math ? x : x.to(math), math);
  const bool direct = has_dense_rows(y);
  const Tensor sums = direct ? y : y.contiguous();
  const int64_t count = stacks.size(), itemsize = y.element_size();
  const Tensor h = at::empty({count, slots.count, max_rank}, rows.options());
  const Tensor factors = weights.defined() ? weights.to(at::kFloat).contiguous() : weights;
  const float* factor = factors.defined() ? factors.const_data_ptr<float>() : nullptr;
  in_math(math, [&](auto zero) {
    using Math = decltype(zero);
    std::vector<Linear<Math>> linears;
    linears.reserve(count);
    auto* to = static_cast<char*>(sums.mutable_data_ptr());
    for (const AdapterStack& stack : stacks) {
      const auto place = static_cast<int64_t>(linears.size());
      linears.push_back({Batch(stack.pages, stack.spans, slots, x.size(0)),
                         readable(stack.a_pages, math), readable(stack.b_pages, math),
                         stack.scalings.const_data_ptr<float>(), factor,
                         h.mutable_data_ptr<Math>() + place * slots.count * max_rank, max_rank,
                         Target{to, storage_of(y.scalar_type()), sums.stride(0)}});
      to += stack.b_pages.size(1) * itemsize;
    }
    run_all(rows, linears);
  });
  if (!direct) y.copy_(sums);
}

void multi_lora_linear_add(const Tensor& y, const Tensor& x, at::TensorList a_pages,
                           at::TensorList b_pages, at::TensorList pages, at::TensorList spans,
                           at::TensorList scalings, const OptTensor& weights, const Tensor& order,
                           const Tensor& offsets, const Tensor&, const OptTensor&, int64_t max_rank,
                           bool) {
  std::vector<AdapterStack> stacks;
  for (size_t i = 0; i < a_pages.size(); ++i) {
    stacks.push_back({a_pages[i], b_pages[i], pages[i], spans[i], scalings[i]});
  }
  const Tensor factors = has(weights) ? *weights : Tensor();
  add_deltas(y, x, stacks, factors, slots_of(order, offsets), max_rank);
}

}  // namespace lora_kernels
