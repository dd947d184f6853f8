"""W[i] = value(codes[i]) · scale(i // block) in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import DequantizeInputs, flat
from ..quant.codes import INT8_UNIT, NESTED_BLOCK, NESTED_CODES, nf4_table


@flat(DequantizeInputs)
def dequantize(inputs: DequantizeInputs) -> Tensor:
    """The op of ``_ops.py``: W ``[rows, cols]``, multiplied in float32 at least and rounded once."""
    codes, scales, nested, format, rows, cols, block, dtype = inputs
    wide = torch.promote_types(dtype, torch.float32)
    numel, size = rows * cols, min(block, rows * cols)
    values = decoded(codes, format)[:numel].to(wide)
    values = torch.nn.functional.pad(values, (0, -numel % size)).view(-1, size)
    factors = decoded_scales(scales, nested) * (INT8_UNIT if format == "int8" else 1.0)
    return (values * factors.to(wide).unsqueeze(1)).view(-1)[:numel].view(rows, cols).to(dtype)


def decoded(codes: Tensor, format: str) -> Tensor:
    """The number behind each code, flat; of ``nf4`` two for each byte."""
    if format == "nf4":
        halves = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
        return nf4_table(codes.device)[halves.int()]
    if format == "fp8":
        return codes.view(-1).view(torch.float8_e4m3fn).float()
    return codes.view(-1)


def decoded_scales(scales: Tensor, nested: Tensor | None) -> Tensor:
    """The scales as float32."""
    if nested is None:
        return scales
    offset, table, factors = nested[:1], nested[1 : 1 + NESTED_CODES], nested[1 + NESTED_CODES :]
    each = factors.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
    return table[scales.int()] * each + offset
