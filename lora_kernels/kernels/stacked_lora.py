"""The delta of a server's batch, in two launches, from the server's own stacks and metadata.

The pages of ``multi_lora_linear`` have a table; a server's adapters lie in stacks padded to one rank, and
its metadata names segments of rows. Each program finds its segment by itself, from the counts, so that a
step prepares nothing for these kernels. Partial sums of the split K are added in order, by the expand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import StackedInputs, flat
from .config import page_tile
from .launch import blocks, precision, unit_columns
from .primitives import cast, dot

# Elements that the launchers promise stacks to start at multiples of, where they do: 16 bytes.
_ALIGNED = 8


@triton.jit
def _segment(
    order_ptr,
    starts_ptr,
    counts_ptr,
    ids_ptr,
    segments,
    HAS_ORDER: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The program's adapter (negative: nothing to do), its rows, and which of them exist."""
    index = tl.arange(0, SEGMENTS)
    inside = index < segments
    counts = tl.load(counts_ptr + index, mask=inside, other=0)
    ids = tl.load(ids_ptr + index, mask=inside, other=-1)
    tiles = tl.where(ids >= 0, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    ends = tl.cumsum(tiles, 0)
    # The first segment whose tiles end beyond this program.
    mine = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
    known = mine < segments
    begin = tl.sum(tl.where(index == mine, ends - tiles, 0), 0)
    place = (tl.program_id(0) - begin) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = known & (place < tl.load(counts_ptr + mine, mask=known, other=0))
    row = tl.load(starts_ptr + mine, mask=known, other=0) + place
    if HAS_ORDER:
        row = tl.load(order_ptr + row, mask=live, other=0)
    return tl.load(ids_ptr + mine, mask=known, other=-1), row.to(tl.int64), live


@triton.jit
def _rank_of(ranks_ptr, adapter, max_rank, HAS_RANKS: tl.constexpr):
    if HAS_RANKS:
        return tl.load(ranks_ptr + adapter, mask=adapter >= 0, other=0)
    return tl.where(adapter >= 0, max_rank, 0)


@triton.jit(do_not_specialize=["rows", "segments"])
def stacked_shrink_kernel(
    x_ptr,
    stack_ptr,
    places_ptr,
    order_ptr,
    starts_ptr,
    counts_ptr,
    ids_ptr,
    ranks_ptr,
    part_ptr,
    rows,
    segments,
    slices,
    K,
    stride_x,
    stride_adapter,
    stride_rank,
    max_rank,
    cols_per_split,
    HAS_ORDER: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    ALIGN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[split, slice, row, r] = x · row r of the slice's A over this split's columns."""
    adapter, row, live = _segment(
        order_ptr, starts_ptr, counts_ptr, ids_ptr, segments, HAS_ORDER, SEGMENTS, BLOCK_M
    )
    part = tl.program_id(1) % slices
    first = tl.program_id(1) // slices * BLOCK_R
    rank = _rank_of(ranks_ptr, adapter, max_rank, HAS_RANKS)
    if first >= rank:
        return
    ranks = first + tl.arange(0, BLOCK_R)
    base = stack_ptr + adapter.to(tl.int64) * stride_adapter
    if HAS_RANKS:  # slices lie one after the other by the adapter's own rank
        base += (part * rank).to(tl.int64) * stride_rank
    else:
        base += tl.multiple_of(tl.load(places_ptr + part), ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    begin = tl.program_id(2) * cols_per_split
    for k in range(begin, min(begin + cols_per_split, K), BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        inside = cols[None, :] < K
        x = tl.load(x_ptr + row[:, None] * stride_x + cols[None, :], mask=live[:, None] & inside, other=0.0)
        offsets = ranks[:, None].to(tl.int64) * stride_rank + cols[None, :]
        a = tl.load(base + offsets, mask=(ranks[:, None] < rank) & inside, other=0.0)
        acc = dot(x, tl.trans(cast(a, x_ptr.dtype.element_ty)), acc, PRECISION)
    offsets = (tl.program_id(2).to(tl.int64) * slices + part) * rows + row[:, None]
    inside = live[:, None] & (ranks[None, :] < rank)
    tl.store(part_ptr + offsets * max_rank + ranks[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def stacked_sum_kernel(
    part_ptr, mapping_ptr, out_ptr, rows, splits, size, max_rank, scaling, BLOCK: tl.constexpr
):
    """out[slice, row] = scaling Σ_split part[split, slice, row] in order; zero without an adapter."""
    row = tl.program_id(0)
    ranks = tl.arange(0, BLOCK)
    inside = (ranks < max_rank) & (tl.load(mapping_ptr + row) >= 0)
    at = (tl.program_id(1).to(tl.int64) * rows + row) * max_rank + ranks
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + tl.cast(split, tl.int64) * size + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, cast(total * scaling, out_ptr.dtype.element_ty), mask=ranks < max_rank)


@triton.jit(do_not_specialize=["segments", "splits"])
def stacked_expand_kernel(
    h_ptr,
    stack_ptr,
    places_ptr,
    order_ptr,
    starts_ptr,
    counts_ptr,
    ids_ptr,
    ranks_ptr,
    scalings_ptr,
    out_ptr,
    segments,
    splits,
    stride_split,
    stride_slice,
    stride_h,
    stride_out,
    max_rank,
    scaling,
    HAS_ORDER: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    HAS_SCALINGS: tl.constexpr,
    ADD: tl.constexpr,
    EIGHTS: tl.constexpr,
    ALIGN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[row, slice's columns] (+)= scaling Σ_r h[slice, row, r] B[:, r]; no other row is touched."""
    adapter, row, live = _segment(
        order_ptr, starts_ptr, counts_ptr, ids_ptr, segments, HAS_ORDER, SEGMENTS, BLOCK_M
    )
    place = places_ptr + 4 * tl.program_id(2)
    width = tl.multiple_of(tl.load(place + 1), ALIGN)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if (adapter < 0) | (tl.program_id(1) * BLOCK_C >= width):
        return
    rank = max_rank
    if HAS_RANKS:
        rank = tl.load(ranks_ptr + adapter)
        if rank == 0:
            return
    stride_adapter = tl.multiple_of(tl.load(place + 2), ALIGN)
    base = stack_ptr + tl.multiple_of(tl.load(place), ALIGN) + adapter.to(tl.int64) * stride_adapter
    dtype = stack_ptr.dtype.element_ty
    factor = scaling
    if HAS_SCALINGS:
        factor *= tl.load(scalings_ptr + adapter).to(tl.float32)
    h_row = h_ptr + tl.program_id(2).to(tl.int64) * stride_slice + row[:, None] * stride_h
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        # Read by whole eights of ranks, which are one load; what is beyond the rank is put out below.
        there = ranks // 8 * 8 < rank if EIGHTS else ranks < rank
        h = tl.load(h_row + ranks[None, :], mask=live[:, None] & there[None, :], other=0.0).to(tl.float32)
        for split in range(1, splits):
            more = h_row + tl.cast(split, tl.int64) * stride_split + ranks[None, :]
            h += tl.load(more, mask=live[:, None] & there[None, :], other=0.0).to(tl.float32)
        # A row of B has its ranks side by side: the tile is read along them, and turned for the product.
        offsets = cols[:, None].to(tl.int64) * max_rank + ranks[None, :]
        b = tl.load(base + offsets, mask=(cols[:, None] < width) & there[None, :], other=0.0)
        if EIGHTS:
            h = tl.where(ranks[None, :] < rank, h, 0.0)
            b = tl.where(ranks[None, :] < rank, b, 0.0)
        acc = dot(cast(h * factor, dtype), tl.trans(b), acc, PRECISION)
    out = out_ptr + row[:, None] * stride_out + tl.multiple_of(tl.load(place + 3), ALIGN) + cols[None, :]
    inside = live[:, None] & (cols[None, :] < width)
    if ADD:
        acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=4096)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 on the device, made once for each set of stacks: their addresses stay while a server runs."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _distances(stacks: Sequence[Tensor]) -> list[int]:
    """Where each stack begins, in elements from the first one's begin."""
    size = stacks[0].element_size()
    return [(stack.data_ptr() - stacks[0].data_ptr()) // size for stack in stacks]


def _align(*numbers: int) -> int:
    """What all are multiples of, as far as the width of a load needs it."""
    align = _ALIGNED
    while any(number % align for number in numbers):
        align //= 2
    return align


def _grid_rows(rows: int, segments: int, block_m: int) -> int:
    """Programs that the rows need at most, however they are distributed."""
    return rows // block_m + min(rows, segments)


def _segment_constants(order: Tensor | None, ids: Tensor) -> dict[str, int]:
    return {"HAS_ORDER": order is not None, "SEGMENTS": triton.next_power_of_2(max(1, ids.shape[0]))}


def _parts(
    x: Tensor,
    lora_a: Sequence[Tensor],
    segments: tuple[Tensor | None, ...],
    ranks: Tensor | None,
    slices: int,
) -> Tensor:
    """Partial sums of h, fp32 [splits, slices, rows, max_rank]; only what an adapter has is written."""
    order, _, _, ids = segments
    x, stack = unit_columns(x), lora_a[0]
    max_rank = stack.shape[1] // (slices if ranks is not None else 1)
    rows, cols = x.shape
    tile = page_tile(cols, max_rank, x.element_size())
    parts = torch.empty(tile.splits, slices, rows, max_rank, dtype=torch.float32, device=x.device)
    places = _distances(lora_a)
    stacked_shrink_kernel[
        _grid_rows(rows, ids.shape[0], tile.block_m),
        slices * triton.cdiv(max_rank, tile.block_r),
        tile.splits,
    ](
        *(x, stack, _table((tuple(places),), x.device), *segments, ranks, parts),
        *(rows, ids.shape[0], slices, cols, x.stride(0), stack.stride(0), stack.stride(1), max_rank),
        tile.cols_per_split,
        HAS_RANKS=ranks is not None,
        ALIGN=_align(*places),
        PRECISION=precision(x.dtype),
        **_segment_constants(order, ids),
        **blocks(tile),
    )
    return parts


def _expand(
    parts: Tensor,
    lora_b: Sequence[Tensor],
    segments: tuple[Tensor | None, ...],
    ranks: Tensor | None,
    scalings: Tensor | None,
    scaling: float,
    offset: int,
    add: bool,
    y: Tensor,
) -> None:
    """``parts`` [splits, slices, rows, max_rank] of any floating dtype."""
    order, _, _, ids = segments
    splits, slices, rows, max_rank = parts.shape
    widths = [b.shape[1] for b in lora_b]
    tile = page_tile(max(widths), max_rank, lora_b[0].element_size())
    places = []
    for distance, b in zip(_distances(lora_b), lora_b, strict=True):
        places.append((distance, b.shape[1], b.stride(0), offset))
        offset += b.shape[1]
    grid = (_grid_rows(rows, ids.shape[0], tile.block_m), triton.cdiv(max(widths), tile.block_c), slices)
    stacked_expand_kernel[grid](
        *(parts, lora_b[0], _table(tuple(places), y.device), *segments, ranks, scalings, y),
        *(ids.shape[0], splits, *parts.stride()[:3], y.stride(0), max_rank, scaling),
        HAS_RANKS=ranks is not None,
        HAS_SCALINGS=scalings is not None,
        ADD=add,
        EIGHTS=ranks is not None and max_rank % 8 == 0,
        ALIGN=_align(*(number for place in places for number in place)),
        PRECISION=precision(lora_b[0].dtype),
        **_segment_constants(order, ids),
        **blocks(tile),
    )


def stacked_lora_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    order: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    mapping: Tensor,
    scaling: float,
    h: Tensor,
) -> None:
    """The op of ``_ops.py``: the partial sums, and one pass that adds them."""
    parts = _parts(x, lora_a, (order, starts, counts, ids), None, len(lora_a))
    splits, slices, rows, max_rank = parts.shape
    stacked_sum_kernel[rows, slices](
        *(parts, mapping, h, rows, splits, slices * rows * max_rank, max_rank, scaling),
        BLOCK=triton.next_power_of_2(max_rank),
    )


def stacked_lora_expand(
    h: Tensor,
    lora_b: Sequence[Tensor],
    order: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    offset: int,
    add: bool,
    y: Tensor,
) -> None:
    """The op of ``_ops.py``."""
    segments = (order, starts, counts, ids)
    _expand(h.contiguous()[None], lora_b, segments, None, None, 1.0, offset, add, y)


@flat(StackedInputs)
def stacked_lora_linear(inputs: StackedInputs) -> None:
    """The op of ``_ops.py``: two launches."""
    x, lora_a, lora_b, *_, ranks, scalings, scaling, offset, add, y = inputs
    parts = _parts(x, lora_a, inputs.segments, ranks, len(lora_b))
    _expand(parts, lora_b, inputs.segments, ranks, scalings, scaling, offset, add, y)
