"""Quantisation by halves of bits that gates switch on: the grid and the gates of Bayesian Bits."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# Each number of bits, and the gate that leads from one to the next.
BITS = (2, 4, 8, 16, 32)
# Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1.
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_SHIFT = _BETA * math.log(-_LOW / _HIGH)
# A gate is open where it would be closed with less than this chance; below this logit it never is.
_CLOSED, _OFF = 0.34, -2.0
_CLIP = 1e-7


def gated_quantise(
    x: Tensor, largest: Tensor, signed: Tensor, gates: Tensor, *, clip: bool = False
) -> Tensor:
    """x₂ + z₄ (x₄ + z₈ (x₈ + z₁₆ (x₁₆ + z₃₂ x₃₂))), x_b = s_b · round(what is left of x / s_b)

    Bayesian Bits (van Baalen et al., 2020, arXiv 2005.07093): s₂ is a third of the range, and each further
    grid divides a step of the one before: s₄ = s₂/5, s₈ = s₄/17, s₁₆ = s₈/257, s₃₂ = s₁₆/65537. Rounding lets
    gradients through.

    Args:
        x: what to quantise.
        largest: half the range where ``signed``, else all of it, a number ``[]``.
        signed: whether x is of both signs, ``[]`` and bool.
        gates: z₄, z₈, z₁₆, z₃₂ in [0, 1].
        clip: whether x is cut to the range first.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)  # the last steps are none in float16
    x, largest, gates = x.to(wide), largest.to(wide), gates.to(wide)
    if clip:
        bound = largest * (1 - _CLIP)
        x = torch.minimum(torch.maximum(x, -bound * signed), bound)
    step = largest * (1 + signed.to(largest.dtype)) / 3
    parts, left = [], x
    for bits, finer in [*pairwise(BITS), (BITS[-1], 0)]:
        parts.append(step * rounded(left / step))
        left = left - parts[-1]
        step = step / (2**bits + 1) if finer else step
    total = parts[-1]
    for part, gate in zip(reversed(parts[:-1]), gates.flip(0), strict=True):
        total = part + gate * total
    return total.to(dtype)


def rounded(x: Tensor) -> Tensor:
    """round(x), whose gradient is that of x."""
    return x + (x.round() - x).detach()


def hard_gates(logits: Tensor) -> Tensor:
    """z ∈ {0, 1}: 1 where σ(β log(-γ/ζ) - φ) < 0.34, so φ > -0.935; the gradient is of the soft gate."""
    soft = _stretched((logits / _BETA).sigmoid())
    hard = ((_SHIFT - logits).sigmoid() < _CLOSED).to(logits.dtype)
    return soft + (hard - soft).detach()


def sampled_gates(logits: Tensor, u: Tensor) -> Tensor:
    """z = clamp(σ((log u - log(1-u) + φ) / β)(ζ-γ) + γ, 0, 1), u uniform of φ's shape; 0 where φ ≤ -2

    The hard concrete distribution (Louizos et al., 2018, arXiv 1712.01312).
    """
    least = torch.finfo(logits.dtype).eps
    return _stretched(((u.clamp(least, 1 - least).logit() + logits) / _BETA).sigmoid()) * (logits > _OFF)


def open_chance(logits: Tensor) -> Tensor:
    """π(φ) = σ(φ - β log(-γ/ζ)): how likely a sampled gate is not zero."""
    return (logits - _SHIFT).sigmoid()


def expected_grids(logits: Tensor) -> Tensor:
    """1 + π₄ (1 + π₈ (1 + π₁₆ (1 + π₃₂))) along the last dimension, of four logits."""
    total = torch.ones_like(logits[..., 0])
    for chance in open_chance(logits).flip(-1).unbind(-1):
        total = 1 + chance * total
    return total


def open_bits(gates: Tensor) -> Tensor:
    """2, 4, 8, 16 or 32: up to the last of the four gates that is open with all before it."""
    return 2 ** (1 + (gates > 0).long().cumprod(-1).sum(-1))


def _stretched(value: Tensor) -> Tensor:
    return (value * (_HIGH - _LOW) + _LOW).clamp(0, 1)
