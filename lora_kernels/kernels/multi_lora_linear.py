"""The delta of rows that use different adapters, in two launches: shrink with split K, then expand.

The split of K depends on the shape of the pages alone, partial sums are added in order: a row's delta does
not depend on the rest of the batch. Backward runs the same two kernels with A and B exchanged, and one more
for the gradients of the pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .._arguments import MultiAdd, MultiBackward, MultiInputs, flat
from .config import page_tile
from .gather import gather_expand_kernel, gather_shrink_kernel, page_grad_kernel
from .launch import blocks, precision, unit_columns


def _layout(of: MultiInputs | MultiBackward) -> tuple[Tensor, ...]:
    """Which pages and which slots are whose."""
    return of.pages, of.spans, of.order, of.offsets, of.tiles


def _shrink(
    x: Tensor, page_data: Tensor, layout: tuple[Tensor, ...], mask: Tensor | None, max_rank: int, per_row: int
) -> Tensor:
    """Partial sums of h, fp32 [splits, slots, max_rank]; only what an adapter has is written."""
    pages, spans, order, offsets, tiles = layout
    x, page_data = unit_columns(x), unit_columns(page_data)
    slots, cols = order.shape[0], x.shape[1]
    tile = page_tile(cols, max_rank, x.element_size(), mask is not None)
    parts = torch.empty(tile.splits, slots, max_rank, dtype=torch.float32, device=x.device)
    gather_shrink_kernel[(tiles.shape[0], triton.cdiv(max_rank, tile.block_r), tile.splits)](
        *(x, page_data, pages, spans, order, offsets, tiles, mask, None, parts),
        *(slots, spans.shape[0], per_row, cols, x.stride(0), page_data.stride(0), max_rank),
        *(tile.cols_per_split, tile.splits),
        HAS_MASK=mask is not None,
        SLICED=False,
        ALIGNED=False,
        PRECISION=precision(x.dtype),
        **blocks(tile),
    )
    return parts


def _expand(
    parts: Tensor,
    page_data: Tensor,
    layout: tuple[Tensor, ...],
    coef: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    per_row: int,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """(out [rows, N], h [slots, max_rank]): h is the scaled sum of the parts, zero beyond a rank."""
    pages, spans, order, offsets, tiles = layout
    page_data = unit_columns(page_data)
    splits, slots, max_rank = parts.shape
    cols = page_data.shape[1]
    tile = page_tile(cols, max_rank, page_data.element_size(), mask is not None)
    h = torch.zeros(slots if keep_h else 0, max_rank, dtype=dtype, device=parts.device)
    out = torch.empty(slots, cols, dtype=dtype, device=parts.device)
    gather_expand_kernel[(tiles.shape[0], triton.cdiv(cols, tile.block_c))](
        *(parts, page_data, pages, spans, order, offsets, tiles, coef, scale, None, mask, None, h, out),
        *(slots, spans.shape[0], cols, page_data.stride(0), cols, max_rank, splits),
        HAS_COEF=True,
        HAS_SCALE=scale is not None,
        ADD=False,
        SLICED=False,
        ALIGNED=False,
        HAS_MASK=mask is not None,
        WRITE_H=keep_h,
        PRECISION=precision(dtype),
        **blocks(tile),
    )
    return (out if per_row == 1 else out.view(-1, per_row, cols).sum(1)), h


def _page_grad(
    vectors: Tensor,
    coef: Tensor,
    x: Tensor,
    layout: tuple[Tensor, ...],
    mask: Tensor | None,
    like: Tensor,
    per_row: int,
) -> Tensor:
    pages, spans, order, offsets, _ = layout
    x = unit_columns(x)
    slots, max_rank = vectors.shape
    cols = x.shape[1]
    tile = page_tile(cols, max_rank, x.element_size(), mask is not None)
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    grid = (spans.shape[0], triton.cdiv(max_rank, tile.block_r), triton.cdiv(cols, tile.block_c))
    page_grad_kernel[grid](
        *(vectors, coef, x, pages, spans, order, offsets, mask, out),
        *(slots, per_row, cols, x.stride(0), max_rank),
        HAS_MASK=mask is not None,
        PRECISION=precision(x.dtype),
        **blocks(tile),
    )
    return out


@flat(MultiInputs)
def multi_lora_linear(inputs: MultiInputs) -> tuple[Tensor, Tensor]:
    """The forward op of ``_ops.py``: the delta and h."""
    x, layout, per_row = inputs.x, _layout(inputs), inputs.order.shape[0] // inputs.x.shape[0]
    parts = _shrink(x, inputs.a_pages, layout, inputs.mask, inputs.max_rank, per_row)
    scales = (inputs.coef, inputs.keep_scale)
    return _expand(parts, inputs.b_pages, layout, *scales, None, x.dtype, per_row, inputs.keep_h)


@flat(MultiBackward)
def multi_lora_linear_backward(saved: MultiBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, x, a_pages, b_pages, *_, h, mask, keep_scale, max_rank, needs = saved
    layout, coef, per_row = _layout(saved), saved.coef, saved.order.shape[0] // dy.shape[0]
    needs_x, needs_a, needs_b, needs_coef = needs
    dx = da = db = dcoef = None
    if needs_x or needs_a or needs_coef:
        parts = _shrink(dy, b_pages, layout, None, max_rank, per_row)
        keep_u = needs_a or needs_coef
        dx, u = _expand(parts, a_pages, layout, coef, keep_scale, mask, dy.dtype, per_row, keep_u)
        # u carries keep_scale, and so does h: dcoef = Σ_r h_r (dY B)_r has it once.
        if needs_a:
            da = _page_grad(u, coef, x, layout, mask, a_pages, per_row)
        if needs_coef:
            plain = h.float() if keep_scale is None else h.float() / keep_scale[:, None]
            dcoef = (u.float() * plain).sum(1).to(coef.dtype)
    if needs_b:
        db = _page_grad(h, coef, dy, layout, None, b_pages, per_row)
    grads = (dx, da, db, dcoef)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all rows of all pages, and the columns of y that are theirs, start at 16 bytes."""
    step = 16
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % step == 0 and t.shape[1] % step == 0 for t in tensors)


@flat(MultiAdd)
def multi_lora_linear_add(inputs: MultiAdd) -> None:
    """The op of ``_ops.py`` that adds into y."""
    y, x, a_pages, b_pages, pages, spans, scalings, weights, *rows, table, max_rank, _ = inputs
    order, tiles = inputs.order, inputs.tiles
    per_row, slots, linears = order.shape[0] // x.shape[0], order.shape[0], len(a_pages)
    direct = per_row == 1 and y.stride(1) == 1
    out = y if direct else torch.zeros(slots, y.shape[1], dtype=y.dtype, device=y.device)
    x, sliced = unit_columns(x), linears > 1
    flags = {
        "HAS_MASK": False,
        "PRECISION": precision(x.dtype),
        "SLICED": sliced,
        "ALIGNED": sliced and _aligned([*a_pages, *b_pages]),
    }
    cols, adapters, widest = x.shape[1], spans[0].shape[0], max(b.shape[1] for b in b_pages)
    a, b = (pages_ if sliced else unit_columns(pages_) for pages_ in (a_pages[0], b_pages[0]))
    tile = page_tile(cols, max_rank, x.element_size())
    parts = torch.empty(linears, tile.splits, slots, max_rank, dtype=torch.float32, device=x.device)
    gather_shrink_kernel[(tiles.shape[0], triton.cdiv(max_rank, tile.block_r), tile.splits * linears)](
        *(x, a, pages[0], spans[0], *rows, None, table, parts),
        *(slots, adapters, per_row, cols, x.stride(0), a.stride(0), max_rank, tile.cols_per_split),
        tile.splits,
        **flags,
        **blocks(tile),
    )
    splits, tile = tile.splits, page_tile(widest, max_rank, b.element_size())
    gather_expand_kernel[(tiles.shape[0], triton.cdiv(widest, tile.block_c), linears)](
        *(parts, b, pages[0], spans[0], *rows, weights, None, scalings[0], None, table, None, out),
        *(slots, adapters, b.shape[1], b.stride(0), out.stride(0), max_rank, splits),
        HAS_COEF=weights is not None,
        HAS_SCALE=False,
        ADD=True,
        WRITE_H=False,
        **flags,
        **blocks(tile),
    )
    if not direct:
        y += out if per_row == 1 else out.view(-1, per_row, y.shape[1]).sum(1)
