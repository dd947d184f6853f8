"""delta_m = Σ_j c_mj · ((drop_mj(x_m) A_iᵀ) B_iᵀ with i = ids_mj: one adapter after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._arguments import MultiAdd, MultiBackward, MultiInputs, flat
from .dropout import keep_of


def _groups(
    pages: Tensor, spans: Tensor, order: Tensor, offsets: Tensor
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(slots, pages, rank) of each adapter that has slots."""
    bounds = offsets.tolist()
    for i, (first, rank) in enumerate(spans.tolist()):
        slots = order[bounds[i] : bounds[i + 1]]
        if len(slots) and rank:
            yield slots.long(), pages[first : first + rank].long(), rank


def _dropped(branch: Tensor, mask: Tensor | None, slots: Tensor) -> Tensor:
    return branch if mask is None else torch.where(keep_of(mask[slots], branch.shape[1]), branch, 0)


def _per_slot(values: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if values is None else values[slots, None].to(dtype)


@flat(MultiInputs)
def multi_lora_linear(inputs: MultiInputs) -> tuple[Tensor, Tensor]:
    """The forward op of ``_ops.py``: the delta and h."""
    x, a_pages, b_pages, pages, spans, coef, order, offsets, _, mask, keep_scale, max_rank, keep_h = inputs
    per_row = len(order) // max(1, len(x))
    delta, h = x.new_zeros(len(x), b_pages.shape[1]), x.new_zeros(len(order), max_rank)
    for slots, own, rank in _groups(pages, spans, order, offsets):
        branch = _dropped(x[slots // per_row], mask, slots)
        part = (branch @ a_pages[own].to(x.dtype).T) * _per_slot(keep_scale, slots, x.dtype)
        h[slots, :rank] = part
        out = (part * _per_slot(coef, slots, x.dtype)) @ b_pages[own].to(x.dtype)
        delta.index_add_(0, slots // per_row, out)
    return delta, h if keep_h else h[:0].clone()


@flat(MultiBackward)
def multi_lora_linear_backward(saved: MultiBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, x, a_pages, b_pages, pages, spans, coef, order, offsets, _, h, mask, keep_scale, _, needs = saved
    per_row, dtype = len(order) // max(1, len(dy)), dy.dtype
    dx = dy.new_zeros(len(dy), a_pages.shape[1])
    da, db, dcoef = torch.zeros_like(a_pages), torch.zeros_like(b_pages), torch.zeros_like(coef)
    for slots, own, rank in _groups(pages, spans, order, offsets):
        rows, scale = slots // per_row, _per_slot(coef, slots, dtype)
        u = dy[rows] @ b_pages[own].to(dtype).T
        dh = u * scale * _per_slot(keep_scale, slots, dtype)
        if needs[0]:
            dx.index_add_(0, rows, _dropped(dh @ a_pages[own].to(dtype), mask, slots))
        if needs[1]:
            da[own] = (dh.T @ _dropped(x[rows], mask, slots)).to(da.dtype)
        if needs[2]:
            db[own] = ((h[slots, :rank] * scale).T @ dy[rows]).to(db.dtype)
        if needs[3]:
            dcoef[slots] = (u * h[slots, :rank]).sum(1).to(coef.dtype)
    return [grad for grad, needed in zip((dx, da, db, dcoef), needs, strict=True) if needed]


@flat(MultiAdd)
def multi_lora_linear_add(inputs: MultiAdd) -> None:
    """The op of ``_ops.py`` that adds into y: one linear after the other."""
    y, x, a_pages, b_pages, pages, spans, scalings, weights, order, offsets, tiles, _, max_rank, _ = inputs
    first, counts = 0, offsets.diff().long()
    for a, b, owned, span, scaling in zip(a_pages, b_pages, pages, spans, scalings, strict=True):
        coef = torch.empty(len(order), dtype=torch.float32, device=x.device)
        per_adapter = torch.cat([scaling, scaling.new_zeros(1)])
        coef[order.long()] = per_adapter.repeat_interleave(counts, output_size=len(order))
        coef = coef if weights is None else coef * weights
        layout = (a, b, owned, span, coef, order, offsets, tiles)
        delta, _ = multi_lora_linear(x, *layout, None, None, max_rank, False)
        y[:, first : first + b.shape[1]] += delta
        first += b.shape[1]
