"""From a quantised weight back to a dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight
from . import _dispatch


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W[i] = value(codes[i]) · scale(i // block)

    Multiplied in float32 (float64 for float64) and rounded to ``dtype`` once, as bitsandbytes does it.

    Args:
        weight: the quantised weight.
        dtype: of the result; by default the dtype that the weight had.

    Returns:
        W, a new tensor ``[N, K]`` without a gradient.

    Raises:
        TypeError: no :class:`QuantizedWeight`, or no floating dtype.

    Examples:
        >>> weight = torch.randn(4, 64)
        >>> (dequantize(quantize(weight, "int8")) - weight).abs().max() < 0.05
        tensor(True)
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    return _dispatch.call("dequantize", *parts(weight), *sizes(weight), dtype)


def parts(weight: QuantizedWeight) -> tuple[Any, ...]:
    """The tensors of ``weight`` as ops take them."""
    return weight.codes, weight.scales, weight.nested


def sizes(weight: QuantizedWeight) -> tuple[Any, ...]:
    """What else an op needs to know of ``weight``."""
    return weight.format, *weight.shape, weight.block
