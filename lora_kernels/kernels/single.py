"""The *single* strategy of ``lora_linear``: y, h and the keep bits in one launch, for few rows.

One loop over K computes x·[Wᵀ | Aᵀ] with h in registers, one small dot adds s (h ⊙ g) Bᵀ. Each block of
columns repeats h's sums (r/BLOCK_C more operations), which is free while the weight's bytes are what is
waited for; the first block of columns writes h and the keep bits. The backward pass is ``beta``'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import LoraInputs
from ..planner import Plan
from . import beta
from .beta import backward
from .config import replaced, single_tile
from .dropout import signed_threshold
from .launch import blocks, gate_argument, precision, unit_columns
from .primitives import apply_gate, cast, dot, drop_tile, load_tile, store_tile

__all__ = ["backward", "forward", "single_kernel"]


@triton.jit(do_not_specialize=["M", "threshold"])
def single_kernel(
    x_ptr,
    branch_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    gate_ptr,
    seed_ptr,
    h_ptr,
    mask_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_branch,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_gm,
    scaling,
    keep_scale,
    threshold,
    SEPARATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x Wᵀ + b + s (h ⊙ g) Bᵀ with h = drop(branch) Aᵀ summed beside it."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    row_bytes = (K + 7) // 8
    writers = tl.where(tl.program_id(0) == 0, M, 0)  # rows of h and of the keep bits to write
    if DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    acc_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, inner, stride_xm, 1, M, K)
        w = load_tile(w_ptr, inner, cols, stride_wk, stride_wn, K, N)
        acc = dot(x, w, acc, PRECISION)
        if SEPARATE:
            x = load_tile(branch_ptr, rows, inner, stride_branch, 1, M, K)
        if DROPOUT:
            bytes_ = k // 8 + tl.arange(0, BLOCK_K // 8)
            x = drop_tile(x, seed, mask_ptr, rows, bytes_, writers, row_bytes, threshold, BLOCK_M, BLOCK_K)
        a = cast(load_tile(a_ptr, inner, ranks, stride_ak, stride_ar, K, R), dtype)
        acc_h = dot(x, a, acc_h, PRECISION)

    h = cast(acc_h * keep_scale, dtype)
    store_tile(h_ptr, h, rows, ranks, R, 1, writers, R)
    if HAS_GATE:
        h = apply_gate(h, gate_ptr, rows, ranks, M, R, stride_gm)
    b = cast(load_tile(b_ptr, ranks, cols, stride_br, stride_bn, R, N), dtype)
    acc += dot(h, b, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION) * scaling
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, rows, cols, N, 1, M, N)


def forward(plan: Plan, inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p = inputs
    if weight is None or lora_a.shape[1] != x.shape[1]:  # one loop over K serves both
        return beta.forward(plan, inputs)
    x = unit_columns(x)
    branch = x if x_lora is None else unit_columns(x_lora)
    (rows, cols), (out, rank) = x.shape, lora_b.shape
    y, h = x.new_empty(rows, out), x.new_empty(rows, rank)
    mask = x.new_empty((0,) if seed is None else (rows, (cols + 7) // 8), dtype=torch.uint8)
    tile = replaced(single_tile(rows, rank, x.element_size()), plan.tile.get("single"))
    gate, stride_gm = gate_argument(gate)
    single_kernel[(triton.cdiv(out, tile.block_c), triton.cdiv(rows, tile.block_m))](
        *(x, branch, weight, lora_a, lora_b, bias, gate, seed, h, mask, y),
        *(rows, out, cols, rank, x.stride(0), branch.stride(0), *weight.stride()),
        *(*lora_a.stride(), *lora_b.stride(), stride_gm),
        *(scaling, 1.0 / (1.0 - dropout_p), signed_threshold(dropout_p)),
        SEPARATE=x_lora is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        DROPOUT=seed is not None,
        PRECISION=precision(x.dtype),
        BLOCK_K=tile.block_k,
        **blocks(tile),
    )
    return y, h, mask
