"""The kernels that gather pages of A and B for rows of different adapters.

A program serves up to BLOCK_M slots of one adapter and walks over that adapter's own pages, so no rank is
padded in memory and none works for another's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._ops import TABLE_WIDTH
from .primitives import cast, dot, load_keep


@triton.jit
def _slots_of(tiles_ptr, order_ptr, offsets_ptr, BLOCK_M: tl.constexpr):
    """The program's adapter (negative: nothing to do), its slots, and which of them exist."""
    adapter = tl.load(tiles_ptr + tl.program_id(0) * 2)
    first = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    place = first + tl.arange(0, BLOCK_M)
    live = (place < tl.load(offsets_ptr + adapter + 1, mask=adapter >= 0, other=0)) & (adapter >= 0)
    return adapter, tl.load(order_ptr + place, mask=live, other=0), live


@triton.jit
def _pages_of(pages_ptr, spans_ptr, adapter, first, adapters, BLOCK_R: tl.constexpr):
    """The adapter's pages from its rank ``first`` on, and which of them exist; none of no adapter."""
    known = (adapter >= 0) & (adapter < adapters)
    ranks = first + tl.arange(0, BLOCK_R)
    live = ranks < tl.load(spans_ptr + 2 * adapter + 1, mask=known, other=0)
    place = tl.load(spans_ptr + 2 * adapter, mask=known, other=0) + ranks
    return tl.load(pages_ptr + place, mask=live, other=0).to(tl.int64), live


@triton.jit
def _load(ptr, rows, row_live, cols, n_cols, stride):
    inside = row_live[:, None] & (cols[None, :] < n_cols)
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=inside, other=0.0)


_WIDTH = tl.constexpr(TABLE_WIDTH)


@triton.jit
def _address(row_ptr, field: tl.constexpr, like, ALIGNED: tl.constexpr):
    """The pointer that a linear's row of the table holds, of the type of ``like``."""
    pointer = tl.load(row_ptr + field).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(row_ptr, field: tl.constexpr, ALIGNED: tl.constexpr):
    """A number that a linear's row of the table holds."""
    value = tl.load(row_ptr + field)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit(do_not_specialize=["slots", "splits"])
def gather_shrink_kernel(
    x_ptr,
    page_ptr,
    pages_ptr,
    spans_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    mask_ptr,
    table_ptr,
    part_ptr,
    slots,
    adapters,
    per_row,
    K,
    stride_x,
    stride_page,
    max_rank,
    cols_per_split,
    splits,
    HAS_MASK: tl.constexpr,
    SLICED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[linear, split, slot, r] = x · page r over this split's columns."""
    split = tl.program_id(2) % splits
    if SLICED:
        linear = tl.program_id(2) // splits
        row_ptr = table_ptr + linear * _WIDTH
        page_ptr = _address(row_ptr, 0, page_ptr, ALIGNED)
        pages_ptr = _address(row_ptr, 2, pages_ptr, False)
        spans_ptr = _address(row_ptr, 3, spans_ptr, False)
        stride_page = _size(row_ptr, 5, ALIGNED)
        part_ptr += linear.to(tl.int64) * splits * slots * max_rank
    adapter, slot, live = _slots_of(tiles_ptr, order_ptr, offsets_ptr, BLOCK_M)
    first = tl.program_id(1) * BLOCK_R
    page, has_page = _pages_of(pages_ptr, spans_ptr, adapter, first, adapters, BLOCK_R)
    if tl.sum(has_page.to(tl.int32), 0) == 0:
        return
    row = slot // per_row
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    begin = split * cols_per_split
    for k in range(begin, min(begin + cols_per_split, K), BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        x = _load(x_ptr, row, live, cols, K, stride_x)
        if HAS_MASK:
            # A slot that does not exist reads slot 0's bits, and is not stored.
            x = tl.where(load_keep(mask_ptr, slot, k, slots, (K + 7) // 8, BLOCK_M, BLOCK_C), x, 0.0)
        a = cast(_load(page_ptr, page, has_page, cols, K, stride_page), x_ptr.dtype.element_ty)
        acc = dot(x, tl.trans(a), acc, PRECISION)
    ranks = first + tl.arange(0, BLOCK_R)
    offsets = (split.to(tl.int64) * slots + slot[:, None]) * max_rank + ranks[None, :]
    tl.store(part_ptr + offsets, acc, mask=live[:, None] & has_page[None, :])


@triton.jit
def _sum_splits(part_ptr, slot, live, ranks, has_page, slots, max_rank, splits):
    """The partial sums of a tile of h, added in the order of the splits."""
    inside = live[:, None] & has_page[None, :]
    offsets = slot[:, None].to(tl.int64) * max_rank + ranks[None, :]
    total = tl.load(part_ptr + offsets, mask=inside, other=0.0)
    for split in range(1, splits):
        skip = tl.cast(split, tl.int64) * slots * max_rank
        total += tl.load(part_ptr + skip + offsets, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["slots"])
def gather_expand_kernel(
    part_ptr,
    page_ptr,
    pages_ptr,
    spans_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    coef_ptr,
    scale_ptr,
    scaling_ptr,
    mask_ptr,
    table_ptr,
    h_ptr,
    out_ptr,
    slots,
    adapters,
    N,
    stride_page,
    stride_out,
    max_rank,
    splits,
    HAS_COEF: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ADD: tl.constexpr,
    SLICED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITE_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[slot] = coef Σ_r h[slot, r] page r, and zero for a slot without an adapter.

    With ADD, out += that, times the adapter's scaling, and a slot without an adapter is left alone.
    """
    adapter, slot, live = _slots_of(tiles_ptr, order_ptr, offsets_ptr, BLOCK_M)
    if adapter < 0 or (ADD and adapter >= adapters):
        return
    if SLICED:
        linear = tl.program_id(2)
        row_ptr = table_ptr + linear * _WIDTH
        page_ptr = _address(row_ptr, 1, page_ptr, ALIGNED)
        pages_ptr = _address(row_ptr, 2, pages_ptr, False)
        spans_ptr = _address(row_ptr, 3, spans_ptr, False)
        scaling_ptr = _address(row_ptr, 4, scaling_ptr, False)
        stride_page = _size(row_ptr, 6, ALIGNED)
        N = _size(row_ptr, 7, ALIGNED)
        out_ptr += _size(row_ptr, 8, ALIGNED)
        part_ptr += linear.to(tl.int64) * splits * slots * max_rank
        if tl.program_id(1) * BLOCK_C >= N:
            return
    dtype = out_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    coef = live.to(tl.float32)
    if HAS_COEF:
        coef *= tl.load(coef_ptr + slot, mask=live, other=0.0).to(tl.float32)
    if ADD:
        coef *= tl.load(scaling_ptr + adapter)
    rank = tl.load(spans_ptr + 2 * adapter + 1, mask=adapter < adapters, other=0)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, rank, BLOCK_R):
        page, has_page = _pages_of(pages_ptr, spans_ptr, adapter, first, adapters, BLOCK_R)
        ranks = first + tl.arange(0, BLOCK_R)
        h = _sum_splits(part_ptr, slot, live, ranks, has_page, slots, max_rank, splits)
        if HAS_SCALE:
            h *= tl.load(scale_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        if WRITE_H and tl.program_id(1) == 0:
            offsets = slot[:, None].to(tl.int64) * max_rank + ranks[None, :]
            tl.store(h_ptr + offsets, cast(h, dtype), mask=live[:, None] & has_page[None, :])
        b = cast(_load(page_ptr, page, has_page, cols, N, stride_page), dtype)
        acc = dot(cast(h * coef[:, None], dtype), b, acc, PRECISION)
    if HAS_MASK:
        first_col = tl.program_id(1) * BLOCK_C
        acc = tl.where(load_keep(mask_ptr, slot, first_col, slots, (N + 7) // 8, BLOCK_M, BLOCK_C), acc, 0.0)
    inside = live[:, None] & (cols[None, :] < N)
    to = out_ptr + slot[:, None].to(tl.int64) * stride_out + cols[None, :]
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, cast(acc, dtype), mask=inside)


@triton.jit(do_not_specialize=["slots"])
def page_grad_kernel(
    vector_ptr,
    coef_ptr,
    x_ptr,
    pages_ptr,
    spans_ptr,
    order_ptr,
    offsets_ptr,
    mask_ptr,
    out_ptr,
    slots,
    per_row,
    C,
    stride_x,
    max_rank,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[page r] = Σ_slots coef vector[slot, r] x[slot], the slots of the page's adapter in order."""
    adapter = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_R
    start = tl.load(spans_ptr + 2 * adapter)
    rank = tl.load(spans_ptr + 2 * adapter + 1)
    if first >= rank:
        return
    ranks = first + tl.arange(0, BLOCK_R)
    page = tl.load(pages_ptr + start + ranks, mask=ranks < rank, other=0).to(tl.int64)
    first_col = tl.program_id(2) * BLOCK_C
    cols = first_col + tl.arange(0, BLOCK_C)
    dtype = x_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    last = tl.load(offsets_ptr + adapter + 1)
    for place in range(tl.load(offsets_ptr + adapter), last, BLOCK_M):
        at = place + tl.arange(0, BLOCK_M)
        live = at < last
        slot = tl.load(order_ptr + at, mask=live, other=0)
        inside = live[:, None] & (ranks[None, :] < rank)
        v = tl.load(
            vector_ptr + slot[:, None].to(tl.int64) * max_rank + ranks[None, :], mask=inside, other=0.0
        )
        v = v.to(tl.float32) * tl.load(coef_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        x = _load(x_ptr, slot // per_row, live, cols, C, stride_x)
        if HAS_MASK:
            x = tl.where(load_keep(mask_ptr, slot, first_col, slots, (C + 7) // 8, BLOCK_M, BLOCK_C), x, 0.0)
        acc = dot(tl.trans(cast(v, dtype)), x, acc, PRECISION)
    inside = (ranks[:, None] < rank) & (cols[None, :] < C)
    tl.store(out_ptr + page[:, None] * C + cols[None, :], cast(acc, out_ptr.dtype.element_ty), mask=inside)
