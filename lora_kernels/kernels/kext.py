"""The *kext* strategy of ``lora_linear``: the branch rides in a GEMM of our own.

    y  = x Wᵀ + s (h ⊙ g) Bᵀ + b          dX = dY W + keep ⊙ (dH A)/(1-p)

Both are one kernel: h (or dH) is a further tile along K, multiplied first, so that its product is
scaled, and masked, in the accumulator that the base GEMM then goes on with. B is never rounded again
and nothing of y or dX is read back. A persistent grid walks over the tiles; operands come through tensor
descriptors on cards that have them, and through pointers where strides or alignment forbid those.
h, the keep bits, U, dB and dA come from the passes of ``beta``, and so does every call without a weight.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import planner
from .._arguments import LoraBackward, LoraInputs
from ..planner import Plan
from . import beta, passes
from .config import GemmTile, kext_tile, replaced
from .launch import blocks, gate_argument, has_descriptors, precision, processors
from .primitives import apply_gate, cast, dot, load_keep, load_tile, store_tile


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: GROUP_M row blocks share their columns while these are in L2."""
    wide, high = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    group = tile // (GROUP_M * wide)
    height = min(high - group * GROUP_M, GROUP_M)
    place = tile % (GROUP_M * wide)
    return (group * GROUP_M + place % height) * BLOCK_M, (place // height) * BLOCK_N


@triton.jit(do_not_specialize=["M"])
def kext_kernel(
    a_ptr,
    w_ptr,
    h_ptr,
    c_ptr,
    gate_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    M,
    N,
    K,
    R,
    stride_am,
    stride_wk,
    stride_wn,
    stride_cr,
    stride_cn,
    stride_gm,
    scale,
    DESCRIPTORS: tl.constexpr,
    ROWS_ALONG_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = a w + keep ⊙ (scale (h ⊙ g) c) + bias; a [M,K], w [K,N], h [M,R], c [R,N]."""
    dtype = h_ptr.dtype.element_ty
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = _place(tile, M, N, BLOCK_M, BLOCK_C, GROUP_M)
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_C)

        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            ranks = r + tl.arange(0, BLOCK_R)
            h = load_tile(h_ptr, rows, ranks, R, 1, M, R)
            if HAS_GATE:
                h = apply_gate(h, gate_ptr, rows, ranks, M, R, stride_gm)
            c = cast(load_tile(c_ptr, ranks, cols, stride_cr, stride_cn, R, N), dtype)
            acc = dot(h, c, acc, PRECISION)
        acc *= scale
        if DROPOUT:
            acc = tl.where(load_keep(mask_ptr, rows, col, M, (N + 7) // 8, BLOCK_M, BLOCK_C), acc, 0.0)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]

        for k in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                a = a_ptr.load([row, k])
                w = w_ptr.load([col, k]).T if ROWS_ALONG_K else w_ptr.load([k, col])
            else:
                inner = k + tl.arange(0, BLOCK_K)
                a = load_tile(a_ptr, rows, inner, stride_am, 1, M, K)
                w = load_tile(w_ptr, inner, cols, stride_wk, stride_wn, K, N)
            acc = dot(a, w, acc, PRECISION)

        if DESCRIPTORS:
            out_ptr.store([row, col], cast(acc, dtype))
        else:
            store_tile(out_ptr, acc, rows, cols, N, 1, M, N)


def matmul(
    a: Tensor,
    w: Tensor,
    h: Tensor,
    c: Tensor,
    tile: GemmTile,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """a w + keep ⊙ (scale (h ⊙ g) c) + bias for a [M,K], w [K,N], h [M,R], c [R,N], of any strides."""
    a = a if a.stride(1) == 1 else a.contiguous()
    (rows, inner), cols, rank = a.shape, w.shape[1], h.shape[1]
    out = a.new_empty(rows, cols)
    along_k = w.stride(0) == 1
    operands = _descriptors(a, w.T if along_k else w, out, along_k, tile)
    gate, stride_gm = gate_argument(gate)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_c)
    a_arg, w_arg, out_arg = (a, w, out) if operands is None else operands
    kext_kernel[(min(tiles, processors(a.device)),)](
        *(a_arg, w_arg, h, c, gate, bias, mask, out_arg),
        *(rows, cols, inner, rank, a.stride(0), *w.stride(), *c.stride(), stride_gm, scale),
        DESCRIPTORS=operands is not None,
        ROWS_ALONG_K=along_k,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        DROPOUT=mask is not None,
        PRECISION=precision(a.dtype),
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        **blocks(tile),
    )
    return out


def _descriptors(
    a: Tensor, w_rows: Tensor, out: Tensor, along_k: bool, tile: GemmTile
) -> tuple[TensorDescriptor, ...] | None:
    """The three large operands as descriptors, or ``None`` where the card or a layout forbids them."""
    if not has_descriptors(a.device) or not all(_describable(t) for t in (a, w_rows, out)):
        return None
    w_block = (tile.block_c, tile.block_k) if along_k else (tile.block_k, tile.block_c)
    described = ((a, (tile.block_m, tile.block_k)), (w_rows, w_block), (out, (tile.block_m, tile.block_c)))
    return tuple(TensorDescriptor.from_tensor(t, list(block)) for t, block in described)


def _describable(tensor: Tensor) -> bool:
    """Rows of unit stride that start at multiples of 16 bytes, and sizes that fit in 32 bits."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    aligned = row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tensor.stride(1) == 1 and aligned and row_bytes > 0 and min(tensor.shape) > 0


def _tile(plan: Plan, rows: int, rank: int, like: Tensor) -> GemmTile:
    tile = kext_tile(rows, rank, like.element_size(), planner.card(like.device))
    return replaced(tile, plan.tile.get("gemm"))


def forward(plan: Plan, inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    x, weight, lora_a, lora_b, bias, gate, _, seed, scaling, dropout_p = inputs
    if weight is None:
        return beta.forward(plan, inputs)
    h, mask = passes.branch_pass(inputs.branch, lora_a, seed, dropout_p, changes=plan.tile.get("forward"))
    tile = _tile(plan, x.shape[0], h.shape[1], x)
    y = matmul(x, weight.T, h, lora_b.T, tile, scale=scaling, bias=bias, gate=gate)
    return y, h, mask


def backward(plan: Plan, saved: LoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, needs, mask, dropout_p = saved.dy, saved.needs, saved.mask, saved.dropout_p
    if saved.weight is None or saved.separate or not needs[0]:
        return beta.backward(plan, saved)
    dh, db, dgate = beta.factor_grads(plan, saved)
    x, changes = saved.x if needs[1] else None, plan.tile.get("x")
    _, da = passes.x_pass(x, dh, saved.lora_a, mask, dropout_p, False, changes)
    keep_scale = 1.0 / (1.0 - dropout_p)
    tile = _tile(plan, dy.shape[0], dh.shape[1], dy)
    dx = matmul(dy, saved.weight, dh, saved.lora_a, tile, scale=keep_scale, mask=mask)
    grads: Any = (dx, da, db, dgate, None)
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]
