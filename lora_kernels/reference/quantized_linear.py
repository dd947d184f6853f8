"""out += x Wᵀ for a quantised W, in eager PyTorch."""

from __future__ import annotations

from torch import Tensor

from .dequantize import dequantize


def quantized_linear(
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    format: str,
    rows: int,
    cols: int,
    block: int,
    transpose: bool,
) -> None:
    """The op of ``_ops.py``: out += x Wᵀ, or with ``transpose`` out += x W."""
    weight = dequantize(codes, scales, nested, format, rows, cols, block, x.dtype)
    out.addmm_(x, weight if transpose else weight.T)
