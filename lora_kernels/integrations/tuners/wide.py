"""Updates whose rank may be W's own: two thin products, or W + ΔW, whichever multiplies less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...adapters.update import Dense, LowRank


def product(x: Tensor, p: float, *pairs: tuple[Tensor, Tensor]) -> LowRank | Dense:
    """ΔW = Σ_i B_i A_i for pairs (B_i, A_i), x being dropped with probability ``p``.

    In half precision W + ΔW would round away what is small in ΔW.
    """
    narrow = torch.is_autocast_enabled(x.device.type) or x.dtype not in (torch.float32, torch.float64)
    if narrow or _thin(x, pairs) <= _dense(x, p, pairs):
        if len(pairs) == 1:
            return LowRank(pairs[0][1], pairs[0][0])
        return LowRank(torch.cat([a for _, a in pairs]), torch.cat([b for b, _ in pairs], 1))
    delta = pairs[0][0] @ pairs[0][1]
    for lora_b, lora_a in pairs[1:]:
        delta = torch.addmm(delta, lora_b, lora_a)
    return Dense(delta)


def _trained(pair: tuple[Tensor, Tensor]) -> int:
    return sum(factor.requires_grad for factor in pair) if torch.is_grad_enabled() else 0


def _thin(x: Tensor, pairs: tuple[tuple[Tensor, Tensor], ...]) -> int:
    """Products of x Aᵀ and of that with Bᵀ, and of their gradients: each side's is of the ranks of all."""
    rows, rank = math.prod(x.shape[:-1]), sum(a.shape[0] for _, a in pairs)
    sides = pairs[0][1].shape[1], pairs[0][0].shape[0]
    if not torch.is_grad_enabled() or not (x.requires_grad or any(map(_trained, pairs))):
        return rows * rank * sum(sides)
    trained = [any(pair[1 - at].requires_grad for pair in pairs) for at in (0, 1)]
    return rows * rank * sum(side * (2 + trains) for side, trains in zip(sides, trained, strict=True))


def _dense(x: Tensor, p: float, pairs: tuple[tuple[Tensor, Tensor], ...]) -> int:
    """Products that make ΔW and take its gradient apart, and those with x that W's do not include."""
    rows, size = math.prod(x.shape[:-1]), pairs[0][0].shape[0] * pairs[0][1].shape[1]
    trained = any(map(_trained, pairs))
    beside = 2 * (p > 0) + trained
    return size * (sum(a.shape[0] * (1 + _trained((b, a))) for b, a in pairs) + rows * beside)
