"""y_t = x_t W_eᵀ + b_e + s · (x_t A_eᵀ) B_eᵀ for rows in order of their expert e, in eager PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._arguments import GroupedBackward, GroupedInputs, flat


def composite(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, offsets: Tensor, scaling: float
) -> Tensor:
    """The equation, all rows with each expert, with autograd's own derivative: the oracle."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    for e in range(weight.shape[0]):
        one = x @ weight[e].T + (x @ a[e].T.to(x.dtype)) @ b[e].T.to(x.dtype) * scaling
        one = one if bias is None else one + bias[e]
        y = torch.where((row >= offsets[e]) & (row < offsets[e + 1]), one, y)
    return y


def _spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    ends: Sequence[int] = offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            yield e, slice(start, end)


@flat(GroupedInputs)
def grouped_lora_linear(inputs: GroupedInputs) -> tuple[Tensor, Tensor]:
    """The forward op of ``_ops.py``: y and h, zero for rows behind the last expert's."""
    x, weight, lora_a, lora_b, bias, offsets, scaling = inputs
    y, h = x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_a.shape[1])
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    for e, rows in _spans(offsets):
        torch.mm(x[rows], a[e].T, out=h[rows])
        part = torch.mm(x[rows], weight[e].T, out=y[rows])
        part.addmm_(h[rows], b[e].T, alpha=scaling)
        if bias is not None:
            part += bias[e]
    return _end(y, offsets), _end(h, offsets)


def _end(rows: Tensor, offsets: Tensor) -> Tensor:
    rows[int(offsets[-1]) :] = 0
    return rows


@flat(GroupedBackward)
def grouped_lora_linear_backward(saved: GroupedBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients of x, W, A, B and b that ``needs`` asks for."""
    dy, x, weight, lora_a, lora_b, h, offsets, scaling, needs = saved
    dx = dy.new_empty(dy.shape[0], weight.shape[2]) if needs[0] else None
    dw, da, db = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) if needed else None
        for t, needed in zip((weight, lora_a, lora_b), needs[1:4], strict=True)
    )
    dbias = dy.new_zeros(weight.shape[:2]) if needs[4] else None
    a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
    for e, rows in _spans(offsets):
        part = dy[rows]
        u = (part @ b[e]).mul_(scaling) if needs[0] or needs[2] else part
        if dx is not None:
            torch.mm(part, weight[e], out=dx[rows]).addmm_(u, a[e])
        if dw is not None and x is not None:
            torch.mm(part.T, x[rows], out=dw[e])
        if da is not None and x is not None:
            da[e] = u.T @ x[rows]
        if db is not None and h is not None:
            db[e] = (part.T @ h[rows]).mul_(scaling)
        if dbias is not None:
            dbias[e] = part.sum(0)
    dx = None if dx is None else _end(dx, offsets)
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]
