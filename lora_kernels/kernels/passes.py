"""The passes over a branch's input, over dY and over x, each of which reads its matrix once.

What they sum over rows or strips is written as fp32 partials and added in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import (
    DY_PASS_MAX_RANK,
    DY_PROGRAMS,
    Changes,
    dy_tile,
    forward_tile,
    replaced,
    row_chunks,
    x_tile,
)
from .dropout import signed_threshold
from .launch import blocks, gate_argument, precision, unit_columns
from .primitives import apply_gate, cast, dot, drop_tile, expand, load_keep, load_tile, store_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_forward_kernel(
    x_ptr,
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
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_gm,
    scaling,
    keep_scale,
    threshold,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXPAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h and the keep bits from one pass over x; with EXPAND also y₀ = b + s (h ⊙ g) Bᵀ."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    row_bytes = (K + 7) // 8
    if DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K)
        if DROPOUT:
            bytes_ = k // 8 + tl.arange(0, BLOCK_C // 8)
            x = drop_tile(x, seed, mask_ptr, rows, bytes_, M, row_bytes, threshold, BLOCK_M, BLOCK_C)
        a = cast(load_tile(a_ptr, cols, ranks, stride_ak, stride_ar, K, R), dtype)
        acc = dot(x, a, acc, PRECISION)

    h = cast(acc * keep_scale, dtype)
    store_tile(h_ptr, h, rows, ranks, R, 1, M, R)
    if EXPAND:
        expand(
            *(h, b_ptr, bias_ptr, gate_ptr, y_ptr, rows, ranks, M, N, R),
            *(stride_bn, stride_br, stride_gm, scaling),
            *(HAS_BIAS, HAS_GATE, PRECISION, BLOCK_M, BLOCK_C),
        )


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def dy_pass_kernel(
    dy_ptr,
    b_ptr,
    h_ptr,
    gate_ptr,
    u_part_ptr,
    db_part_ptr,
    M,
    N,
    R,
    stride_dym,
    stride_bn,
    stride_br,
    stride_gm,
    rows_per_chunk,
    HAS_GATE: tl.constexpr,
    NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALED: tl.constexpr = False,
    NEED_DSCALE: tl.constexpr = False,
    factor_ptr=None,
    scaled_ptr=None,
    z_ptr=None,
    dscale_part_ptr=None,
):
    """Reads each element of dY once: U's part from this strip of columns, dB's from these rows.

    For an op that scales its output by column also dY ⊙ factor, and these rows' part of Σ dY ⊙ z.
    """
    strip, chunk = tl.program_id(0), tl.program_id(1)
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    b = cast(load_tile(b_ptr, cols, ranks, stride_bn, stride_br, N, R), dy_ptr.dtype.element_ty)
    u_part_ptr += strip.to(tl.int64) * M * R
    db_part_ptr += chunk.to(tl.int64) * N * R

    db = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if SCALED:
        factor = tl.load(factor_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if NEED_DSCALE:
        dscale = tl.zeros((BLOCK_C,), tl.float32)
    first = chunk * rows_per_chunk
    for m in range(first, min(first + rows_per_chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        dy = load_tile(dy_ptr, rows, cols, stride_dym, 1, M, N)
        u = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        store_tile(u_part_ptr, u, rows, ranks, R, 1, M, R)
        if NEED_DB:
            h = load_tile(h_ptr, rows, ranks, R, 1, M, R)
            if HAS_GATE:
                h = apply_gate(h, gate_ptr, rows, ranks, M, R, stride_gm)
            db = dot(tl.trans(dy), h, db, PRECISION)
        if SCALED:
            store_tile(scaled_ptr, dy.to(tl.float32) * factor[None, :], rows, cols, N, 1, M, N)
        if NEED_DSCALE:
            z = load_tile(z_ptr, rows, cols, N, 1, M, N)
            dscale += tl.sum(dy.to(tl.float32) * z.to(tl.float32), 0)
    if NEED_DSCALE:
        tl.store(dscale_part_ptr + chunk.to(tl.int64) * N + cols, dscale, mask=cols < N)
    if NEED_DB:
        store_tile(db_part_ptr, db, cols, ranks, R, 1, N, R)


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def x_pass_kernel(
    x_ptr,
    a_ptr,
    dh_ptr,
    mask_ptr,
    dx_ptr,
    da_part_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_ar,
    stride_ak,
    rows_per_chunk,
    keep_scale,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reads each element of x once for dA's part from these rows, and writes dX₀ beside it."""
    strip, chunk = tl.program_id(0), tl.program_id(1)
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    row_bytes = (K + 7) // 8
    a = cast(load_tile(a_ptr, ranks, cols, stride_ar, stride_ak, R, K), dh_ptr.dtype.element_ty)
    da_part_ptr += chunk.to(tl.int64) * R * K

    da = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first = chunk * rows_per_chunk
    for m in range(first, min(first + rows_per_chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        dh = load_tile(dh_ptr, rows, ranks, R, 1, M, R)
        if DROPOUT:
            keep = load_keep(mask_ptr, rows, strip * BLOCK_C, M, row_bytes, BLOCK_M, BLOCK_C)
        if NEED_DX:
            dx = dot(dh, a, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION) * keep_scale
            if DROPOUT:
                dx = tl.where(keep, dx, 0.0)
            store_tile(dx_ptr, dx, rows, cols, K, 1, M, K)
        if NEED_DA:
            x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            da = dot(tl.trans(x), dh, da, PRECISION)
    if NEED_DA:
        store_tile(da_part_ptr, da * keep_scale, cols, ranks, 1, K, K, R)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(part_ptr, out_ptr, numel, parts, scale, BLOCK: tl.constexpr):
    """out = scale · Σ parts, in the order of the parts."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(part_ptr + part * numel.to(tl.int64) + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, cast(total * scale, out_ptr.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale · parts.sum(0) in ``dtype``, always in the same order."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    block = 1024
    sum_parts_kernel[(triton.cdiv(out.numel(), block),)](
        parts, out, out.numel(), parts.shape[0], scale, BLOCK=block
    )
    return out


def branch_pass(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    lora_b: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float = 1.0,
    y: Tensor | None = None,
    changes: Changes = None,
) -> tuple[Tensor, Tensor]:
    """h and the keep bits; where ``y`` is given, b + s (h ⊙ g) Bᵀ is written to it."""
    x = unit_columns(x)
    (rows, cols), rank = x.shape, lora_a.shape[0]
    h = x.new_empty(rows, rank)
    mask = x.new_empty((0,) if seed is None else (rows, (cols + 7) // 8), dtype=torch.uint8)
    tile = replaced(forward_tile(rows, rank, x.element_size()), changes)
    gate, stride_gm = gate_argument(gate)
    out, strides_b = (0, (0, 0)) if y is None else (y.shape[1], lora_b.stride())
    lora_forward_kernel[(triton.cdiv(rows, tile.block_m),)](
        *(x, lora_a, lora_b, bias, gate, seed, h, mask, y),
        *(rows, out, cols, rank, x.stride(0), *lora_a.stride(), *strides_b, stride_gm),
        *(scaling, 1.0 / (1.0 - dropout_p), signed_threshold(dropout_p)),
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        DROPOUT=seed is not None,
        EXPAND=y is not None,
        PRECISION=precision(x.dtype),
        **blocks(tile),
    )
    return h, mask


class Unscaling:
    """What else a :func:`dy_pass` gives, by column: ``scaled`` = dY ⊙ factor and ``dscale`` = Σ dY ⊙ z."""

    def __init__(self, dy: Tensor, factor: Tensor, z: Tensor | None, needs_scaled: bool) -> None:
        self.factor, self.z = factor.contiguous(), z
        self.scaled = dy.new_empty(dy.shape) if needs_scaled else None
        self.dscale: Tensor | None = None

    def arguments(self, chunks: int) -> dict[str, Any]:
        """For the kernel, which sums over the rows of one of ``chunks``."""
        flags = {"SCALED": self.scaled is not None, "NEED_DSCALE": self.z is not None}
        shape = (chunks, self.factor.shape[0])
        if self.z is not None:
            self.dscale = torch.empty(shape, dtype=torch.float32, device=self.z.device)
        pointers = {"factor_ptr": self.factor, "scaled_ptr": self.scaled}
        return {**flags, **pointers, "z_ptr": self.z, "dscale_part_ptr": self.dscale}

    def finish(self) -> None:
        """Adds up the chunks."""
        if self.dscale is not None:
            self.dscale = sum_parts(self.dscale, torch.float32, 1.0)


def dy_pass(
    dy: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scaling: float,
    unscaling: Unscaling | None = None,
    changes: Changes = None,
) -> tuple[Tensor, Tensor | None]:
    """U = s dY B and, where h is given, dB = s dYᵀ (h ⊙ g). U is fp32 where a gate follows and the
    kernel computes it.
    """
    (rows, out), rank = dy.shape, lora_b.shape[1]
    if rank > DY_PASS_MAX_RANK and unscaling is None:
        return _dy_products(dy, lora_b, h, gate, scaling)
    dy = unit_columns(dy)
    lean = unscaling is not None or torch.version.hip is not None
    tile = replaced(dy_tile(rows, out, rank, dy.element_size(), lean), changes)
    strips = triton.cdiv(out, tile.block_c)
    chunks, rows_per_chunk = row_chunks(rows, out, tile, DY_PROGRAMS)
    u_parts = torch.empty(strips, rows, rank, dtype=torch.float32, device=dy.device)
    db_parts = (
        torch.empty(chunks, out, rank, dtype=torch.float32, device=dy.device) if h is not None else None
    )
    gate_arg, stride_gm = gate_argument(gate)
    dy_pass_kernel[(strips, chunks)](
        *(dy, lora_b, h, gate_arg, u_parts, u_parts if db_parts is None else db_parts),
        *(rows, out, rank, dy.stride(0), *lora_b.stride(), stride_gm, rows_per_chunk),
        HAS_GATE=gate is not None,
        NEED_DB=h is not None,
        PRECISION=precision(dy.dtype),
        **blocks(tile),
        **({} if unscaling is None else unscaling.arguments(chunks)),
    )
    if unscaling is not None:
        unscaling.finish()
    u = sum_parts(u_parts, dy.dtype if gate is None else torch.float32, scaling)
    return u, None if db_parts is None else sum_parts(db_parts, lora_b.dtype, scaling)


def _dy_products(
    dy: Tensor, lora_b: Tensor, h: Tensor | None, gate: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """The same by the vendor's GEMM."""
    u = torch.mm(dy, lora_b.to(dy.dtype)).mul_(scaling)
    if h is None:
        return u, None
    gated = h if gate is None else (h * gate).to(dy.dtype)
    return u, torch.mm(dy.T, gated).mul_(scaling).to(lora_b.dtype)


def x_pass(
    x: Tensor | None,
    dh: Tensor,
    lora_a: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    needs_branch: bool,
    changes: Changes = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dX₀ = keep ⊙ (dH A)/(1-p) where asked for, and dA = dHᵀ drop(x) where x is given."""
    if x is None and not needs_branch:
        return None, None
    x = None if x is None else unit_columns(x)
    (rows, rank), cols = dh.shape, lora_a.shape[1]
    tile = replaced(x_tile(rank, dh.element_size()), changes)
    chunks, rows_per_chunk = row_chunks(rows, cols, tile)
    dx = dh.new_empty(rows, cols) if needs_branch else None
    da_parts = (
        torch.empty(chunks, rank, cols, dtype=torch.float32, device=dh.device) if x is not None else None
    )
    x_pass_kernel[(triton.cdiv(cols, tile.block_c), chunks)](
        *(x, lora_a, dh, mask, dx, dh if da_parts is None else da_parts),
        *(rows, cols, rank, 0 if x is None else x.stride(0), *lora_a.stride(), rows_per_chunk),
        1.0 / (1.0 - dropout_p),
        DROPOUT=mask is not None,
        NEED_DX=needs_branch,
        NEED_DA=x is not None,
        PRECISION=precision(dh.dtype),
        **blocks(tile),
    )
    return dx, None if da_parts is None else sum_parts(da_parts, lora_a.dtype, 1.0)
