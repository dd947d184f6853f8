"""y_i = x W_iᵀ + b_i + s_i · ((drop_i(x) A_iᵀ) ⊙ g_i) B_iᵀ on Triton, by *beta*'s scheme.

Forward: one pass over x writes every member's h, keep bits and b_i + s_i (h_i ⊙ g_i) B_iᵀ; the vendor's
GEMM accumulates each x W_iᵀ. Backward: one pass over each dY_i (``passes.dy_pass``); one pass over x gives
every dA_i and writes Σ keep_i ⊙ (dH_i A_i)/(1-p_i), into which the GEMMs accumulate each dY_i W_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import GroupBackward, GroupInputs, flat
from ..reference.lora_linear import grad_gate
from ..reference.lora_linear_group import accumulate
from . import passes
from .config import Tile, group_forward_tile, group_x_tile, padded_rank, row_chunks
from .dropout import signed_threshold
from .launch import blocks, gate_argument, precision, unit_columns
from .primitives import cast, dot, drop_tile, expand, load_keep, load_tile, store_tile

# The sums of all members stay in registers side by side: their padded ranks may add up to this.
MAX_WIDTH = 256


@triton.jit
def _shrink_step(
    acc,
    x,
    a_ptr,
    mask_ptr,
    seed,
    threshold,
    rows,
    cols,
    bytes_,
    ranks,
    M,
    K,
    R,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc + drop(x) Aᵀ for one member's tile; writes the tile's keep bits."""
    row_bytes = (K + 7) // 8
    if DROPOUT:
        x = drop_tile(x, seed, mask_ptr, rows, bytes_, M, row_bytes, threshold, BLOCK_M, BLOCK_C)
    a = cast(load_tile(a_ptr, cols, ranks, stride_ak, stride_ar, K, R), x.dtype)
    return dot(x, a, acc, PRECISION)


@triton.jit(do_not_specialize=["M", "thresholds"])
def group_forward_kernel(
    x_ptr,
    a_ptrs,
    b_ptrs,
    bias_ptrs,
    gate_ptrs,
    seed_ptr,
    h_ptrs,
    mask_ptrs,
    y_ptrs,
    M,
    K,
    outs,
    ranks,
    stride_xm,
    strides_ar,
    strides_ak,
    strides_bn,
    strides_br,
    strides_gm,
    scalings,
    keep_scales,
    thresholds,
    MEMBERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reads x once: h, the keep bits and y₀ = b + s (h ⊙ g) Bᵀ of each member."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    sums = (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),) * MEMBERS
    for k in range(0, K, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        bytes_ = k // 8 + tl.arange(0, BLOCK_C // 8)
        x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K)
        grown = ()
        for i in tl.static_range(MEMBERS):
            seed = tl.load(seed_ptr + i) if DROPOUT else 0
            grown += (  # type: ignore[assignment]
                _shrink_step(
                    *(sums[i], x, a_ptrs[i], mask_ptrs[i], seed, thresholds[i], rows, cols, bytes_, r),
                    *(M, K, ranks[i], strides_ar[i], strides_ak[i]),
                    *(DROPOUT, PRECISION, BLOCK_M, BLOCK_C),
                ),
            )
        sums = grown
    for i in tl.static_range(MEMBERS):
        h = cast(sums[i] * keep_scales[i], dtype)
        store_tile(h_ptrs[i], h, rows, r, ranks[i], 1, M, ranks[i])
        expand(
            *(h, b_ptrs[i], bias_ptrs[i], gate_ptrs[i], y_ptrs[i], rows, r, M, outs[i], ranks[i]),
            *(strides_bn[i], strides_br[i], strides_gm[i], scalings[i]),
            *(HAS_BIAS, HAS_GATE, PRECISION, BLOCK_M, BLOCK_C),
        )


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def group_x_pass_kernel(
    x_ptr,
    a_ptrs,
    dh_ptrs,
    mask_ptrs,
    dx_ptr,
    da_part_ptrs,
    M,
    K,
    ranks,
    stride_xm,
    strides_ar,
    strides_ak,
    rows_per_chunk,
    keep_scales,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reads x once for every member's part of dA from these rows, and writes their common dX₀."""
    strip, chunk = tl.program_id(0), tl.program_id(1)
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    row_bytes = (K + 7) // 8
    dtype = dh_ptrs[0].dtype.element_ty
    grads = (tl.zeros((BLOCK_C, BLOCK_R), tl.float32),) * MEMBERS
    first = chunk * rows_per_chunk
    for m in range(first, min(first + rows_per_chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        dx = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if NEED_DA:
            x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K)
        grown = ()
        for i in tl.static_range(MEMBERS):
            dh = load_tile(dh_ptrs[i], rows, r, ranks[i], 1, M, ranks[i])
            if DROPOUT:
                keep = load_keep(mask_ptrs[i], rows, strip * BLOCK_C, M, row_bytes, BLOCK_M, BLOCK_C)
            if NEED_DX:
                a = cast(load_tile(a_ptrs[i], r, cols, strides_ar[i], strides_ak[i], ranks[i], K), dtype)
                part = dot(dh, a, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION) * keep_scales[i]
                dx += tl.where(keep, part, 0.0) if DROPOUT else part
            if NEED_DA:
                branch = tl.where(keep, x, 0.0) if DROPOUT else x
                grown += (dot(tl.trans(branch), dh, grads[i], PRECISION),)  # type: ignore[assignment]
            else:
                grown += (grads[i],)  # type: ignore[assignment]
        grads = grown
        if NEED_DX:
            store_tile(dx_ptr, dx, rows, cols, K, 1, M, K)
    if NEED_DA:
        for i in tl.static_range(MEMBERS):
            part_ptr = da_part_ptrs[i] + chunk.to(tl.int64) * ranks[i] * K
            store_tile(part_ptr, grads[i] * keep_scales[i], cols, r, 1, K, K, ranks[i])


@flat(GroupInputs)
def lora_linear_group(inputs: GroupInputs) -> list[Tensor]:
    """The forward op of ``_ops.py``: y of each, h of each, the keep bits of those that drop."""
    x, weights, lora_as, lora_bs, biases, gates, seeds, scalings, dropout_ps = inputs
    rows = x.shape[0]
    ys = [x.new_empty(rows, b.shape[0]) for b in lora_bs]
    drawn = iter(() if seeds is None else seeds.split(1))
    own_seeds = [next(drawn) if p > 0.0 else None for p in dropout_ps]
    members = (lora_as, own_seeds, dropout_ps, lora_bs, biases, gates, scalings, ys)
    if _fused(lora_as, own_seeds, biases, gates):
        hs, masks = _branch_passes(x, seeds, *members)
    else:
        apart = [passes.branch_pass(x, *member) for member in zip(*members, strict=True)]
        hs, masks = map(list, zip(*apart, strict=True))
        masks = [mask for mask in masks if mask.numel()]
    for y, weight in zip(ys, weights, strict=True):
        if weight is not None:
            y.addmm_(x, weight.T)
    return ys + hs + masks


def _fused(lora_as: Sequence[Tensor], *options: Sequence[Tensor | None]) -> bool:
    """Whether one launch serves all: narrow enough, and an option that one has, all have."""
    width = len(lora_as) * padded_rank(max(a.shape[0] for a in lora_as))
    return width <= MAX_WIDTH and all(len({t is None for t in option}) == 1 for option in options)


def _branch_passes(
    x: Tensor,
    seeds: Tensor | None,
    lora_as: Sequence[Tensor],
    own_seeds: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    scalings: Sequence[float],
    ys: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Every h and the keep bits; b + s (h ⊙ g) Bᵀ is written to each of ``ys``."""
    x = unit_columns(x)
    (rows, cols), ranks = x.shape, [a.shape[0] for a in lora_as]
    hs = [x.new_empty(rows, rank) for rank in ranks]
    masks = [x.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8) for seed in own_seeds if seed is not None]
    tile = group_forward_tile(rows, len(ranks), max(ranks), x.element_size(), seeds is not None)
    gate_args, strides_gm = zip(*map(gate_argument, gates), strict=True)
    nothing = (0,) * len(ranks)
    group_forward_kernel[(triton.cdiv(rows, tile.block_m),)](
        *(x, tuple(lora_as), tuple(lora_bs)),
        *(nothing if biases[0] is None else tuple(biases), nothing if gates[0] is None else gate_args),
        *(seeds, tuple(hs), tuple(masks) or nothing, tuple(ys)),
        *(rows, cols, tuple(y.shape[1] for y in ys), tuple(ranks), x.stride(0)),
        *(_strides(lora_as, 0), _strides(lora_as, 1), _strides(lora_bs, 0), _strides(lora_bs, 1)),
        *(strides_gm, tuple(map(float, scalings)), _keep_scales(dropout_ps)),
        tuple(map(signed_threshold, dropout_ps)),
        MEMBERS=len(ranks),
        HAS_BIAS=biases[0] is not None,
        HAS_GATE=gates[0] is not None,
        DROPOUT=seeds is not None,
        PRECISION=precision(x.dtype),
        **blocks(tile),
    )
    return hs, masks


def _strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    return tuple(tensor.stride(dim) for tensor in tensors)


def _keep_scales(dropout_ps: Sequence[float]) -> tuple[float, ...]:
    return tuple(1.0 / (1.0 - p) for p in dropout_ps)


@flat(GroupBackward)
def lora_linear_group_backward(saved: GroupBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dys, x, weights, lora_as, lora_bs, hs, gates, masks, scalings, dropout_ps, needs = saved
    needs_a, needs_b, needs_gate = needs[1::3], needs[2::3], needs[3::3]
    dhs, dbs, dgates = [], [], []
    for i, dy in enumerate(map(unit_columns, dys)):
        u, db = passes.dy_pass(dy, lora_bs[i], hs[i] if needs_b[i] else None, gates[i], scalings[i])
        dhs.append(u if gates[i] is None else (u * gates[i]).to(dy.dtype))
        dbs.append(db)
        dgates.append(grad_gate(u, hs[i], gates[i]) if needs_gate[i] else None)
    x_passes = _x_passes if _fused(lora_as, masks) else _separate_x_passes
    dx, das = x_passes(x if any(needs_a) else None, dhs, lora_as, masks, dropout_ps, needs[0])
    if needs[0]:
        accumulate(dx, dys, weights)
    grads = [dx, *(grad for member in zip(das, dbs, dgates, strict=True) for grad in member)]
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _separate_x_passes(
    x: Tensor | None,
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What :func:`_x_passes` gives, with one pass a member."""
    members = zip(dhs, lora_as, masks, dropout_ps, strict=True)
    branches, das = zip(*(passes.x_pass(x, *member, needs_x) for member in members), strict=True)
    dx = branches[0]
    for branch in branches[1:] if needs_x else ():
        dx.add_(branch)
    return dx, list(das)


def _x_passes(
    x: Tensor | None,
    dhs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX₀ = Σ keep_i ⊙ (dH_i A_i)/(1-p_i) where asked for, and each dA_i where x is given."""
    if x is None and not needs_x:
        return None, [None] * len(dhs)
    x = None if x is None else unit_columns(x)
    rows, cols = dhs[0].shape[0], lora_as[0].shape[1]
    ranks = [a.shape[0] for a in lora_as]
    tile: Tile = group_x_tile(len(ranks), max(ranks), dhs[0].element_size(), masks[0] is not None)
    chunks, rows_per_chunk = row_chunks(rows, cols, tile)
    dx = dhs[0].new_empty(rows, cols) if needs_x else None
    parts = [dhs[0].new_empty(chunks, rank, cols, dtype=torch.float32) for rank in ranks]
    nothing = (0,) * len(ranks)
    group_x_pass_kernel[(triton.cdiv(cols, tile.block_c), chunks)](
        *(x, tuple(lora_as), tuple(dhs), nothing if masks[0] is None else tuple(masks), dx),
        *(tuple(parts) if x is not None else nothing, rows, cols, tuple(ranks)),
        *(0 if x is None else x.stride(0), _strides(lora_as, 0), _strides(lora_as, 1)),
        *(rows_per_chunk, _keep_scales(dropout_ps)),
        MEMBERS=len(ranks),
        DROPOUT=masks[0] is not None,
        NEED_DX=needs_x,
        NEED_DA=x is not None,
        PRECISION=precision(dhs[0].dtype),
        **blocks(tile),
    )
    if x is None:
        return dx, [None] * len(dhs)
    return dx, [passes.sum_parts(p, a.dtype, 1.0) for p, a in zip(parts, lora_as, strict=True)]
