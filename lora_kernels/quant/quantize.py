"""From a dense weight to codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import FP8_LARGEST, NESTED_BLOCK, dynamic_values, nearest, nf4_table
from .weight import FORMATS, MIN_BLOCK, QuantizedWeight

# The least magnitude that is divided by: a block of zeros stays one.
_LEAST = 1e-38


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = False,
    per_tensor: bool = False,
) -> QuantizedWeight:
    """codes[i] = the code whose value is next to W[i] / scale(i // block), scale = max |W| of a block

    The numbers are bitsandbytes': NF4 as ``quantize_4bit`` (QLoRA, arXiv 2305.14314), int8 as
    ``int8_vectorwise_quant`` (LLM.int8, arXiv 2208.07339; ``Linear8bitLt`` rounds the weight to float16
    first). fp8 is float8_e4m3fn under scales of float32, max |W| / 448.

    Args:
        weight: ``[N, K]``, any floating dtype; it is not changed, and what comes back is frozen.
        format: ``nf4`` (4.5 bits an element; 4.13 with ``double_quant``), ``int8`` or ``fp8`` (8 bits).
        block_size: ``nf4``: consecutive elements that share a scale, a power of two from 32.
        double_quant: ``nf4``: the scales are quantised to 8 bits as well.
        per_tensor: ``fp8``: one scale for the weight instead of one a row.

    Raises:
        TypeError: the weight is no floating tensor.
        ValueError: no matrix or an empty one, no such format, or an option that the format does not have.

    Examples:
        >>> quantize(torch.randn(4, 64), "nf4").codes.dtype
        torch.uint8
    """
    _check(weight, format, block_size, double_quant, per_tensor)
    # Rows of float32 or narrower are exact in float32; float64 is rounded, once.
    wide = weight.detach().to(torch.float32)
    if format == "nf4":
        return _nf4(wide, weight.dtype, block_size, double_quant)
    return _int8(wide, weight.dtype) if format == "int8" else _fp8(wide, weight.dtype, per_tensor)


def _check(weight: Tensor, format: str, block_size: int, double_quant: bool, per_tensor: bool) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions, got {weight.dim()}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one element, got shape {tuple(weight.shape)}")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if block_size < MIN_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of two of at least {MIN_BLOCK}, got {block_size}")
    for name, given, owner in (("double_quant", double_quant, "nf4"), ("per_tensor", per_tensor, "fp8")):
        if given and format != owner:
            raise ValueError(f"{name}: expected False for format {format!r}, it is {owner}'s")


def _nf4(weight: Tensor, dtype: torch.dtype, block: int, double: bool) -> QuantizedWeight:
    flat = weight.reshape(-1)
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(-1, block)
    scales = blocks.abs().amax(1)
    # bitsandbytes multiplies whole blocks by a reciprocal and divides a last, shorter one.
    parts = [(blocks * (1.0 / scales.clamp(min=_LEAST)).unsqueeze(1)).reshape(-1)]
    if whole < flat.numel():
        last = flat[whole:].abs().max().clamp(min=_LEAST)
        scales = torch.cat([scales, last.view(1)])
        parts.append(flat[whole:] / last)
    if flat.numel() % 2:
        parts.append(flat.new_zeros(1))
    codes = nearest(torch.cat(parts), nf4_table(flat.device)).to(torch.uint8)
    packed = (codes[::2] << 4) | codes[1::2]
    scales, nested = _quantize_scales(scales) if double else (scales, None)
    return QuantizedWeight(packed, scales, nested, "nf4", (weight.shape[0], weight.shape[1]), block, dtype)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit codes for the scales' distances to their mean, and the float32 numbers behind them."""
    offset = scales.mean()
    away = scales - offset
    table = dynamic_values().to(scales.device)
    padded = torch.nn.functional.pad(away, (0, -away.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = padded.abs().amax(1)
    inverse = 1.0 / largest.clamp(min=_LEAST)
    codes = nearest((padded * inverse.unsqueeze(1)).view(-1)[: away.numel()], table).to(torch.uint8)
    return codes, torch.cat([offset.view(1), table, largest])


def _int8(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    rows, cols = weight.shape
    scales = weight.abs().amax(1)
    factor = torch.where(scales == 0, 0.0, 127.0 / scales)
    codes = torch.round(weight * factor.unsqueeze(1)).to(torch.int8)
    return QuantizedWeight(codes, scales, None, "int8", (rows, cols), cols, dtype)


def _fp8(weight: Tensor, dtype: torch.dtype, per_tensor: bool) -> QuantizedWeight:
    if not hasattr(torch, "float8_e4m3fn"):
        raise ValueError("format: 'fp8' needs a torch with float8_e4m3fn")
    rows, cols = weight.shape
    lines = weight.reshape(1, -1) if per_tensor else weight
    scales = lines.abs().amax(1) / FP8_LARGEST
    scaled = (lines / scales.clamp(min=_LEAST).unsqueeze(1)).clamp(-FP8_LARGEST, FP8_LARGEST)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).view(rows, cols)
    return QuantizedWeight(codes, scales, None, "fp8", (rows, cols), lines.shape[1], dtype)
