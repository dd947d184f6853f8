"""y[rows of i] (+)= s_i · (x[rows] A_iᵀ) B_iᵀ for a server's segments: one adapter after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._arguments import StackedInputs, flat


def _segments(
    order: Tensor | None, starts: Tensor, counts: Tensor, ids: Tensor
) -> Iterator[tuple[Tensor, int]]:
    """(rows, adapter) of each segment that has both."""
    for start, count, adapter in zip(starts.tolist(), counts.tolist(), ids.tolist(), strict=False):
        if count > 0 and adapter >= 0:
            places = torch.arange(start, start + count, device=starts.device)
            yield (places if order is None else order[places].long()), adapter


def _factors(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], ranks: Tensor | None, i: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(A, B) of each slice of adapter i; with ranks, its A has the slices one after the other."""
    for s, b in enumerate(lora_b):
        if ranks is None:
            yield lora_a[s][i], b[i]
        else:
            rank = int(ranks[i])
            yield lora_a[0][i, s * rank : (s + 1) * rank], b[i, :, :rank]


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
    """The op of ``_ops.py``: h [slices, rows, max_rank], zero for a row without an adapter."""
    h.zero_()
    for rows, i in _segments(order, starts, counts, ids):
        for s, a in enumerate(lora_a):
            h[s, rows] = ((x[rows] @ a[i].to(x.dtype).T) * scaling).to(h.dtype)


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
    """The op of ``_ops.py``: other rows and columns of y stay as they are."""
    for rows, i in _segments(order, starts, counts, ids):
        column = offset
        for s, b in enumerate(lora_b):
            delta = (h[s, rows].to(b.dtype) @ b[i].T).to(y.dtype)
            cols = slice(column, column + b.shape[1])
            y[rows, cols] = y[rows, cols] + delta if add else delta
            column += b.shape[1]


@flat(StackedInputs)
def stacked_lora_linear(inputs: StackedInputs) -> None:
    """The op of ``_ops.py``: both, with each adapter's own rank and scaling where they are given."""
    x, lora_a, lora_b, *_, ranks, scalings, scaling, offset, add, y = inputs
    for rows, i in _segments(*inputs.segments):
        column, factor = offset, scaling if scalings is None else scaling * float(scalings[i])
        for a, b in _factors(lora_a, lora_b, ranks, i):
            delta = (((x[rows] @ a.to(x.dtype).T) * factor) @ b.to(x.dtype).T).to(y.dtype)
            cols = slice(column, column + len(b))
            y[rows, cols] = y[rows, cols] + delta if add else delta
            column += len(b)
