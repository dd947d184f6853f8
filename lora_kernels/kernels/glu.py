"""act(gate) ⊙ up and its gradients: one pass each, elements read and written once, fp32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import cast

_BLOCK = 1024
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# 2 √(2/π), and the cubic term's factor of the tanh form; 1 + tanh(u) is 2 sigmoid(2u).
_TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _share(g, ACTIVATION: tl.constexpr):
    """act(g) / g."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(g * _SQRT_HALF))
    if ACTIVATION == "gelu_tanh":
        return tl.sigmoid(g * _TWO_SQRT_2_PI * (1.0 + g * g * _CUBIC))
    return tl.sigmoid(g)


@triton.jit
def _slope(g, share, ACTIVATION: tl.constexpr):
    """act'(g), where ``share`` is act(g) / g."""
    if ACTIVATION == "gelu":
        return share + g * _INV_SQRT_2PI * tl.exp(-0.5 * g * g)
    # 1 - share, without the digits that a difference would lose.
    rest = g * share * _share(-g, ACTIVATION)
    if ACTIVATION == "gelu_tanh":
        # Its inner slope grows as g² where the rest has long been zero.
        rest = rest * _TWO_SQRT_2_PI * (1.0 + g * g * _CUBIC * 3.0)
    return share + rest


@triton.jit
def glu_kernel(gate_ptr, up_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    product = g * _share(g, ACTIVATION) * up
    tl.store(out_ptr + at, cast(product, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    count,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = _share(g, ACTIVATION)
    dgate = dy * up * _slope(g, share, ACTIVATION)
    tl.store(dgate_ptr + at, cast(dgate, dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, cast(dy * g * share, dup_ptr.dtype.element_ty), mask=inside)


def _grid(like: Tensor) -> tuple[int]:
    return (triton.cdiv(like.numel(), _BLOCK),)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The op of ``_ops.py``."""
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    if product.numel():
        glu_kernel[_grid(gate)](gate, up, product, gate.numel(), activation, _BLOCK)
    return product


def glu_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dproduct, gate, up = dproduct.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dgate.numel():
        args = (dproduct, gate, up, dgate, dup, gate.numel(), activation, _BLOCK)
        glu_backward_kernel[_grid(gate)](*args)
    return dgate, dup
