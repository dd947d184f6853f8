"""y = x Wᵀ + b + c ⊙ z - d Wᵀ with d = drop(x) and z = d (W + s B A)ᵀ, around the vendor's GEMM.

Bytes decide the form: c is applied to activations, in one pass that the bias shares, and not to W, which
would be read and written whole at each call. In backward the pass over dY that gives U and dB gives
dY ⊙ c and dc too; c goes to the rows of B and dB there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import DoraBackward, DoraInputs, flat
from .launch import unit_columns
from .passes import Unscaling, branch_pass, dy_pass, x_pass
from .primitives import load_keep, load_tile, store_tile

_ROWS, _COLS = 32, 128


@triton.jit(do_not_specialize=["M"])
def scale_kernel(
    z_ptr, scale_ptr, bias_ptr, y_ptr, M, N, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """y = z ⊙ scale + b, by column."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    z = load_tile(z_ptr, rows, cols, N, 1, M, N).to(tl.float32)
    y = z * tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, y, rows, cols, N, 1, M, N)


@triton.jit(do_not_specialize=["M"])
def split_kernel(
    x_ptr,
    mask_ptr,
    dropped_ptr,
    rest_ptr,
    M,
    K,
    stride_xm,
    keep_scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d = drop(x) and x - d."""
    first = tl.program_id(1) * COLS
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLS)
    x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K).to(tl.float32)
    keep = load_keep(mask_ptr, rows, first, M, (K + 7) // 8, ROWS, COLS)
    store_tile(dropped_ptr, tl.where(keep, x * keep_scale, 0.0), rows, cols, K, 1, M, K)
    store_tile(rest_ptr, tl.where(keep, x - x * keep_scale, x), rows, cols, K, 1, M, K)


@triton.jit(do_not_specialize=["M"])
def add_kept_kernel(sum_ptr, x_ptr, mask_ptr, M, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    """sum += keep ⊙ x."""
    first = tl.program_id(1) * COLS
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLS)
    keep = load_keep(mask_ptr, rows, first, M, (K + 7) // 8, ROWS, COLS)
    x = tl.where(keep, load_tile(x_ptr, rows, cols, K, 1, M, K).to(tl.float32), 0.0)
    total = load_tile(sum_ptr, rows, cols, K, 1, M, K).to(tl.float32) + x
    store_tile(sum_ptr, total, rows, cols, K, 1, M, K)


def _grid(like: Tensor) -> tuple[int, int]:
    return triton.cdiv(like.shape[0], _ROWS), triton.cdiv(like.shape[1], _COLS)


def _scaled(z: Tensor, scale: Tensor, bias: Tensor | None, keep_z: bool) -> Tensor:
    """z ⊙ scale + b, in z's own memory if it is not needed any more."""
    y = torch.empty_like(z) if keep_z else z
    bias = None if bias is None else bias.contiguous()
    scale_kernel[_grid(z)](z, scale.contiguous(), bias, y, *z.shape, bias is not None, _ROWS, _COLS)
    return y


def _split(x: Tensor, mask: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    x = unit_columns(x)
    dropped, rest = x.new_empty(x.shape), x.new_empty(x.shape)
    keep_scale = 1.0 / (1.0 - dropout_p)
    split_kernel[_grid(x)](x, mask, dropped, rest, *x.shape, x.stride(0), keep_scale, _ROWS, _COLS)
    return dropped, rest


@flat(DoraInputs)
def dora_linear(inputs: DoraInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, z, h and the packed keep bits."""
    x, weight, lora_a, lora_b, scale, bias, seed, scaling, dropout_p, keep_z = inputs
    z = x.new_empty(x.shape[0], lora_b.shape[0])
    h, mask = branch_pass(x, lora_a, seed, dropout_p, lora_b, None, None, scaling, z)
    branch, rest = (x, None) if seed is None else _split(x, mask, dropout_p)
    z.addmm_(branch, weight.T)
    y = _scaled(z, scale, bias, keep_z)
    if rest is not None:
        y.addmm_(rest, weight.T)
    return y, z if keep_z else z.new_empty(0, z.shape[1]), h, mask


@flat(DoraBackward)
def dora_linear_backward(saved: DoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dy, x, weight, lora_a, lora_b, scale, z, h, mask, scaling, dropout_p, needs = saved
    needs_x, needs_a, needs_b, needs_scale = needs
    dy = unit_columns(dy)
    factor = scale if mask is None else (scale - 1) / (1.0 - dropout_p)
    unscaling = Unscaling(dy, factor, z if needs_scale else None, needs_x)
    scaled_b = lora_b * scale[:, None]
    u, db = dy_pass(dy, scaled_b, h if needs_b else None, None, scaling, unscaling)
    dx, da = x_pass(x if needs_a else None, u, lora_a, mask, dropout_p, needs_x)
    if needs_x and mask is None:
        dx.addmm_(unscaling.scaled, weight)
    elif needs_x:
        add_kept_kernel[_grid(dx)](dx, unscaling.scaled @ weight, mask, *dx.shape, _ROWS, _COLS)
        dx.addmm_(dy, weight)
    db = (db * scale[:, None]).to(lora_b.dtype) if needs_b else None
    dscale = unscaling.dscale.to(scale.dtype) if needs_scale else None
    return [grad for grad, needed in zip((dx, da, db, dscale), needs, strict=True) if needed]
