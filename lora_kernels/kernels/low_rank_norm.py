"""‖w_n + s b_n A‖ for each row n, from one pass over W; the sum of both lives in registers only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import norm_tile
from .launch import blocks, precision
from .primitives import dot, load_tile


@triton.jit
def low_rank_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    b = load_tile(b_ptr, rows, ranks, stride_bn, stride_br, N, R)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k in range(0, K, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        w = load_tile(w_ptr, rows, cols, stride_wn, stride_wk, N, K).to(tl.float32)
        a = load_tile(a_ptr, ranks, cols, stride_ar, stride_ak, R, K)
        row = w + scaling * dot(b, a, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
        total += row * row
    tl.store(out_ptr + rows, tl.sqrt(tl.sum(total, 1)), mask=rows < N)


def low_rank_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The op of ``_ops.py``. Factors of two dtypes, or of a half one under a wide W, are taken wide."""
    if lora_a.dtype != lora_b.dtype or weight.dtype == torch.float32:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    (out, cols), rank = weight.shape, lora_a.shape[0]
    norms = torch.empty(out, dtype=torch.float32, device=weight.device)
    tile = norm_tile(rank, max(weight.element_size(), lora_a.element_size()))
    low_rank_norm_kernel[(triton.cdiv(out, tile.block_m),)](
        *(weight, lora_a, lora_b, norms, out, cols, rank),
        *(*weight.stride(), *lora_a.stride(), *lora_b.stride(), scaling),
        PRECISION=precision(weight.dtype),
        **blocks(tile),
    )
    return norms
