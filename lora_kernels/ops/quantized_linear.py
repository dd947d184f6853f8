"""The linear over a quantised weight, without a branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight
from . import _dispatch
from ._inputs import autocasts, compute_dtype
from ._lora_function import output_like
from .dequantize import dequantize, parts, sizes


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b

    A few rows are multiplied while W is decoded, so that its codes are read once and nothing dense is
    written; many rows after W was decoded into memory that the next layer uses again. Neither is kept for
    the backward pass, dX = dY W, which decodes W anew. W has no gradient.

    Shapes: x ``[..., K]``, W ``[N, K]``, bias ``[N]``; y is ``[..., N]``, of x's dtype. Under autocast x
    and the bias are cast to its dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a device does not fit.

    Examples:
        >>> quantized_linear(torch.randn(2, 64), quantize(torch.randn(8, 64))).shape
        torch.Size([2, 8])
    """
    _check(x, weight, bias)
    if autocasts(x):
        dtype = compute_dtype(x)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if _dispatch.transformed():
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    return _QuantizedLinear.apply(x, bias, *parts(weight), sizes(weight))


def accumulate(
    out: Tensor, x: Tensor, parts: tuple[Any, ...], sizes: tuple[Any, ...], transpose: bool
) -> Tensor:
    """``out`` += x Wᵀ, or with ``transpose`` x W; x is ``[rows, features]``."""
    _dispatch.call("quantized_linear", out, x, *parts, *sizes, transpose)
    return out


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating Tensor, got {got}")
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    rows, cols = weight.shape
    if x.shape[-1:] != (cols,):
        raise ValueError(f"x: expected last dimension {cols} (the weight's), got shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} (x's), got {weight.device}")
    if bias is not None:
        if bias.shape != (rows,):
            raise ValueError(f"bias: expected shape {(rows,)}, got {tuple(bias.shape)}")
        if bias.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"bias: expected {x.dtype} (x's), got {bias.dtype}")


class _QuantizedLinear(torch.autograd.Function):
    """Saves the codes and no activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        nested: Tensor | None,
        sizes: tuple[Any, ...],
    ) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(codes, scales, nested)
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_zeros(rows.shape[0], sizes[1])
        y = y if bias is None else y.copy_(bias)
        return output_like(accumulate(y, rows, (codes, scales, nested), sizes, False), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _LinearInTranspose.apply(dy, *ctx.saved_tensors, ctx.sizes) if ctx.needs_input_grad[0] else None
        bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, bias, None, None, None, None


class _LinearInTranspose(torch.autograd.Function):
    """dX = dY W, differentiable in dY."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, codes: Tensor, scales: Tensor, nested: Tensor | None, sizes: tuple[Any, ...]
    ) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(codes, scales, nested)
        rows = dy.reshape(-1, dy.shape[-1])
        dx = rows.new_zeros(rows.shape[0], sizes[2])
        return output_like(accumulate(dx, rows, (codes, scales, nested), sizes, True), dy)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return _QuantizedLinear.apply(ddx, None, *ctx.saved_tensors, ctx.sizes), None, None, None, None
