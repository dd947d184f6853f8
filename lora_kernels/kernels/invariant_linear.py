"""y = x Wᵀ with one tile shape for every number of rows, so that no row's sum depends on the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import invariant_tile
from .launch import blocks, precision, unit_columns
from .primitives import dot, load_tile, store_tile


@triton.jit(do_not_specialize=["M"])
def invariant_linear_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_R] of y, K in order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, rows, cols, stride_x, 1, M, K)
        w = load_tile(w_ptr, outputs, cols, stride_w, 1, N, K)
        acc = dot(x, tl.trans(w), acc, PRECISION)
    store_tile(y_ptr, acc, rows, outputs, N, 1, M, N)


def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The op of ``_ops.py``."""
    x, weight = unit_columns(x), unit_columns(weight)
    rows, out = x.shape[0], weight.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    tile = invariant_tile(x.element_size())
    invariant_linear_kernel[(triton.cdiv(rows, tile.block_m), triton.cdiv(out, tile.block_r))](
        *(x, weight, y, rows, out, x.shape[1], x.stride(0), weight.stride(0)),
        PRECISION=precision(x.dtype),
        **blocks(tile),
    )
    return y
