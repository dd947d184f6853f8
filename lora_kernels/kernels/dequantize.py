"""Decoding a quantised weight: a tile of it in registers, or the whole of it into memory.

Bytes of :func:`dequantize_kernel` for W [N, K] in a type of b bytes: it reads N·K/2 codes and 4·N·K/64
of scales (nf4; N·K/64 where those are quantised), or N·K codes and 4·N of scales (int8, fp8), and writes
b·N·K. At 4096² in bf16 that is 9.4 MB read and 33.6 MB written.

fp8 is decoded by integer arithmetic, so that it works on cards without the type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import DequantizeInputs, flat
from ..quant.codes import INT8_UNIT, NESTED_BLOCK, NESTED_CODES, nf4_table
from .primitives import store_tile

_UNIT = tl.constexpr(INT8_UNIT)
_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)
_FACTORS = tl.constexpr(1 + NESTED_CODES)


@triton.jit
def load_scale(scales_ptr, nested_ptr, block, inside, NESTED: tl.constexpr):
    """The scales of blocks; a code of 8 bits, a table and a second scale where they are quantised."""
    if NESTED:
        code = tl.load(scales_ptr + block, mask=inside, other=0).to(tl.int32)
        value = tl.load(nested_ptr + 1 + code, mask=inside, other=0.0)
        factor = tl.load(nested_ptr + _FACTORS + block // _NESTED_BLOCK, mask=inside, other=0.0)
        scale = value * factor + tl.load(nested_ptr)
    else:
        scale = tl.load(scales_ptr + block, mask=inside, other=0.0)
    return scale


@triton.jit
def fp8_value(code):
    """The float32 behind the bits of float8_e4m3fn; the smallest have no exponent."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, (normal - 0.0078125) * 2.0, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def load_nf4(
    codes_ptr,
    scales_ptr,
    nested_ptr,
    table_ptr,
    rows,
    first_col,
    N,
    K,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRED: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tile [rows, COLS] from ``first_col``. PAIRED: K is even, so that a row starts with a byte."""
    if PAIRED:
        pairs = first_col // 2 + tl.arange(0, COLS // 2)
        inside = (rows[:, None] < N) & (pairs[None, :] < K // 2)
        at = rows[:, None].to(tl.int64) * (K // 2) + pairs[None, :]
        packed = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
        scale = load_scale(scales_ptr, nested_ptr, at // (SCALE_BLOCK // 2), inside, NESTED)
        first = tl.load(table_ptr + (packed >> 4)) * scale
        second = tl.load(table_ptr + (packed & 15)) * scale
        weight = tl.interleave(first, second)
    else:
        cols = first_col + tl.arange(0, COLS)
        inside = (rows[:, None] < N) & (cols[None, :] < K)
        at = rows[:, None].to(tl.int64) * K + cols[None, :]
        packed = tl.load(codes_ptr + at // 2, mask=inside, other=0).to(tl.int32)
        code = (packed >> (4 * (1 - at % 2)).to(tl.int32)) & 15
        scale = load_scale(scales_ptr, nested_ptr, at // SCALE_BLOCK, inside, NESTED)
        weight = tl.load(table_ptr + code) * scale
    return weight


@triton.jit
def load_weight(
    codes_ptr,
    scales_ptr,
    nested_ptr,
    table_ptr,
    rows,
    first_col,
    N,
    K,
    row_step,
    FORMAT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRED: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tile [rows, COLS] of W in float32, zero outside it.

    ``row_step`` is 1 where int8 or fp8 has a scale a row, 0 where one serves all.
    """
    if FORMAT == "nf4":
        weight = load_nf4(
            *(codes_ptr, scales_ptr, nested_ptr, table_ptr, rows, first_col, N, K),
            *(SCALE_BLOCK, NESTED, PAIRED, COLS),
        )
    else:
        cols = first_col + tl.arange(0, COLS)
        inside = (rows[:, None] < N) & (cols[None, :] < K)
        at = rows[:, None].to(tl.int64) * K + cols[None, :]
        code = tl.load(codes_ptr + at, mask=inside, other=0)
        scale = tl.load(scales_ptr + rows * row_step, mask=rows < N, other=0.0)[:, None]
        if FORMAT == "int8":
            weight = code.to(tl.float32) * (scale * _UNIT)
        else:
            weight = fp8_value(code.to(tl.int32)) * scale
    return weight


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scales_ptr,
    nested_ptr,
    table_ptr,
    out_ptr,
    N,
    K,
    row_step,
    FORMAT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of W in out's dtype."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_col = tl.program_id(1) * BLOCK_C
    weight = load_weight(
        *(codes_ptr, scales_ptr, nested_ptr, table_ptr, rows, first_col, N, K, row_step),
        *(FORMAT, SCALE_BLOCK, NESTED, PAIRED, BLOCK_C),
    )
    store_tile(out_ptr, weight, rows, first_col + tl.arange(0, BLOCK_C), K, 1, N, K)


DEQUANTIZE_ROWS, DEQUANTIZE_COLS = 16, 256


@flat(DequantizeInputs)
def dequantize(inputs: DequantizeInputs) -> Tensor:
    """The op of ``_ops.py``: W ``[rows, cols]``.

    The result is new memory each time and not a buffer kept here: what one layer frees torch's allocator
    hands to the next on the same stream, within a captured graph from the graph's own pool, and after the
    step to whatever needs it.
    """
    codes, scales, nested, format, rows, cols, block, dtype = inputs
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(rows, DEQUANTIZE_ROWS), triton.cdiv(cols, DEQUANTIZE_COLS))
    pointers, row_step, options = weight_arguments(codes, scales, nested, format, cols, block)
    dequantize_kernel[grid](
        *pointers, out, rows, cols, row_step, **options, BLOCK_N=DEQUANTIZE_ROWS, BLOCK_C=DEQUANTIZE_COLS
    )
    return out


def weight_arguments(
    codes: Tensor, scales: Tensor, nested: Tensor | None, format: str, cols: int, block: int
) -> tuple[tuple[Tensor | None, ...], int, dict[str, object]]:
    """The pointers, the step between rows' scales and the constants of a kernel that loads a weight."""
    four_bit = format == "nf4"
    pointers = (codes, scales, nested, nf4_table(codes.device) if four_bit else None)
    options = {
        "FORMAT": format,
        "SCALE_BLOCK": block if four_bit else 0,
        "NESTED": nested is not None,
        "PAIRED": cols % 2 == 0,
    }
    return pointers, int(block == cols), options
