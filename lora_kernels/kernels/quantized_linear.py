"""y = x Wᵀ + b + s ((x Aᵀ) ⊙ g) Bᵀ for few rows of x, W decoded in the tile that multiplies it.

Bytes of :func:`quantized_linear_kernel` for x [M, K], W [N, K] and elements of b bytes: the codes and
scales of W once for each BLOCK_M rows (N·K·(1/2 + 4/64) for nf4, N·K + 4·N for int8 and fp8), M·N·b of y,
and of x, A and B little else than what the caches hold: every program reads x and A. At 4096² and M ≤ 16
that is 9.4 MB for nf4, where the dense bf16 weight has 33.6 MB.

Many rows are multiplied by the vendor's GEMM, and dX = dY W always is: then W is decoded into memory
first (``dequantize.py``), and only its codes outlive the call.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._arguments import QuantizedProduct, flat
from .config import QUANTIZED_ROWS, quantized_tile
from .dequantize import dequantize, load_weight, weight_arguments
from .launch import gate_argument, precision, unit_columns
from .primitives import apply_gate, cast, dot, load_tile, store_tile


@triton.jit(do_not_specialize=["M"])
def quantized_linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    nested_ptr,
    table_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    gate_ptr,
    h_ptr,
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
    stride_ym,
    row_step,
    scaling,
    FORMAT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRED: tl.constexpr,
    BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of y: x Wᵀ, with ADD what y held, with BRANCH the adapter's part and h."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_C):
        cols = k + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, rows, cols, stride_xm, 1, M, K)
        weight = load_weight(
            *(codes_ptr, scales_ptr, nested_ptr, table_ptr, outs, k, N, K, row_step),
            *(FORMAT, SCALE_BLOCK, NESTED, PAIRED, BLOCK_C),
        )
        acc = dot(x, tl.trans(cast(weight, dtype)), acc, PRECISION)
        if BRANCH:
            a = cast(load_tile(a_ptr, cols, ranks, stride_ak, stride_ar, K, R), dtype)
            h_acc = dot(x, a, h_acc, PRECISION)

    if BRANCH:
        h = cast(h_acc, dtype)
        if tl.program_id(0) == 0:
            store_tile(h_ptr, h, rows, ranks, R, 1, M, R)
        if HAS_GATE:
            h = apply_gate(h, gate_ptr, rows, ranks, M, R, stride_gm)
        b = cast(load_tile(b_ptr, ranks, outs, stride_br, stride_bn, R, N), dtype)
        acc += dot(h, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * scaling
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outs, mask=outs < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += load_tile(y_ptr, rows, outs, stride_ym, 1, M, N).to(tl.float32)
    store_tile(y_ptr, acc, rows, outs, stride_ym, 1, M, N)


@flat(QuantizedProduct)
def quantized_linear(inputs: QuantizedProduct) -> None:
    """The op of ``_ops.py``: out += x Wᵀ, or with ``transpose`` out += x W."""
    out, x, transpose = inputs.out, inputs.x, inputs.transpose
    if not transpose and x.shape[0] <= QUANTIZED_ROWS:
        launch(out, x, inputs.weight)
    else:
        dense = dequantize(*inputs.weight, x.dtype)
        out.addmm_(x, dense if transpose else dense.T)


def launch(
    y: Tensor,
    x: Tensor,
    weight: tuple[Any, ...],
    factors: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float = 1.0,
    h: Tensor | None = None,
) -> None:
    """y += x Wᵀ; with ``factors`` A and B, y = x Wᵀ + b + s (h ⊙ g) Bᵀ, and h is written."""
    codes, scales, nested, format, rows, cols, block = weight
    x = unit_columns(x)
    count, rank = x.shape[0], 1 if factors is None else factors[0].shape[0]
    tile = quantized_tile(count, rank, x.element_size())
    lora_a, lora_b = (None, None) if factors is None else factors
    strides = (0, 0, 0, 0) if factors is None else (*lora_a.stride(), *lora_b.stride())
    gate, stride_gm = gate_argument(gate)
    pointers, row_step, options = weight_arguments(codes, scales, nested, format, cols, block)
    grid = (triton.cdiv(rows, tile.block_n), triton.cdiv(count, tile.block_m))
    quantized_linear_kernel[grid](
        *(x, *pointers, lora_a, lora_b, bias, gate, h, y),
        *(count, rows, cols, rank, x.stride(0), *strides, stride_gm, y.stride(0), row_step, scaling),
        **options,
        BRANCH=factors is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        ADD=factors is None,
        PRECISION=precision(x.dtype),
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        BLOCK_R=tile.block_r,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
