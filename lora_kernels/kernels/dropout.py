"""The dropout mask on its own; the linear's forward makes the same bits in its pass over x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.dropout import threshold
from .primitives import keep_bytes


@triton.jit(do_not_specialize=["rows", "threshold"])
def dropout_mask_kernel(
    mask_ptr,
    seed_ptr,
    limit_ptr,
    rows,
    row_bytes,
    threshold,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PER_ROW:
        limits = tl.load(limit_ptr + row, mask=row < rows, other=0)[:, None]
        packed = keep_bytes(tl.load(seed_ptr), row, col, row_bytes, limits)
    else:
        packed = keep_bytes(tl.load(seed_ptr), row, col, row_bytes, threshold)
    inside = (row[:, None] < rows) & (col[None, :] < row_bytes)
    offsets = row[:, None].to(tl.int64) * row_bytes + col[None, :]
    tl.store(mask_ptr + offsets, packed.to(tl.uint8), mask=inside)


def signed_threshold(dropout_p: float) -> int:
    """The 32-bit threshold as the signed int32 that Triton passes; the kernel reads it unsigned."""
    limit = threshold(dropout_p)
    return limit - 2**32 if limit >= 2**31 else limit


def dropout_mask(seed: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    """Packed keep bits, uint8 ``[rows, ceil(cols/8)]``."""
    return _mask(seed, rows, cols, None, signed_threshold(dropout_p))


def row_dropout_mask(seed: Tensor, dropout_ps: Tensor, cols: int) -> Tensor:
    """The same with a probability of its own for each row, float32 ``[rows]``."""
    limits = (dropout_ps.double() * 2**32).round().clamp(max=2**32 - 1).long()
    return _mask(seed, dropout_ps.shape[0], cols, limits, 0)


def _mask(seed: Tensor, rows: int, cols: int, limits: Tensor | None, threshold: int) -> Tensor:
    row_bytes = (cols + 7) // 8
    mask = torch.empty(rows, row_bytes, dtype=torch.uint8, device=seed.device)
    if mask.numel():
        grid = (triton.cdiv(rows, 16), triton.cdiv(row_bytes, 128))
        per_row = limits is not None
        dropout_mask_kernel[grid](mask, seed, limits, rows, row_bytes, threshold, per_row, 16, 128)
    return mask
