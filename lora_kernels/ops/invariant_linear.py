"""A linear whose rows come out the same, bit for bit, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, every y_m a function of x_m, W and b alone

    A vendor's GEMM picks its kernel, and with it the order of its sums, by the number of rows. This one sums
    over K in one order, at the price of a plainer loop. The gradients are the vendor's.

    Shapes: x ``[..., K]``, weight ``[N, K]``, bias ``[N]``; y ``[..., N]``, all of one floating dtype.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype differs from x's.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight: expected shape (N, {x.shape[-1]}), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {x.dtype} (x's), got {weight.dtype}")
    rows = _InvariantLinear.apply(x.reshape(-1, x.shape[-1]), weight)
    y = rows.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class _InvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return _dispatch.call("invariant_linear", rows, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad
        return dy @ weight if needs_rows else None, dy.T @ rows if needs_weight else None
