"""Updates whose rank may be W's own: thin products, or W + ΔW, whichever takes less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...adapters.update import Branched, Dense, LowRank
from ...ops.moved_rank import MovedRank

Pair = tuple[Tensor, Tensor]

# Multiply-adds in the time that ΔW, W + ΔW and ΔW's gradient take an element of W in memory.
_PASSES = 64


def product(x: Tensor, p: float, pair: Pair) -> LowRank | Dense:
    """ΔW = B A for a pair (B, A); ``p`` is the probability with which x is dropped."""
    lora_b, lora_a = pair
    return Dense(lora_b @ lora_a) if _is_dense(x, p, pair) else LowRank(lora_a, lora_b)


def moved(x: Tensor, pair: Pair, constant: Pair) -> LowRank | Branched | Dense:
    """ΔW = B A + B₀ A₀, of a pair that trains and one that does not."""
    (lora_b, lora_a), (b0, a0) = pair, constant
    if _is_narrow(x):
        return LowRank(torch.cat([lora_a, a0]), torch.cat([lora_b, b0], 1))
    if _is_dense(x, 0.0, pair, constant):
        return Dense(torch.addmm(b0 @ a0, lora_b, lora_a))
    return Branched(MovedRank(lora_b.shape[0]), (lora_a, lora_b, a0, b0))


def _is_narrow(x: Tensor) -> bool:
    """In half precision W + ΔW would round away what is small in ΔW, and so would one sum after another."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype not in (torch.float32, torch.float64)


def _is_dense(x: Tensor, p: float, *pairs: Pair) -> bool:
    return not _is_narrow(x) and _dense(x, p, pairs) < _thin(x, pairs)


def _trained(pair: Pair) -> int:
    return sum(factor.requires_grad for factor in pair) if torch.is_grad_enabled() else 0


def _thin(x: Tensor, pairs: tuple[Pair, ...]) -> int:
    """Multiply-adds of x Aᵀ and of that with Bᵀ, of their gradients, and of those of A and B."""
    rows = math.prod(x.shape[:-1])
    backward = torch.is_grad_enabled() and (x.requires_grad or any(map(_trained, pairs)))
    each = 0
    for lora_b, lora_a in pairs:
        out, into = lora_b.shape[0], lora_a.shape[1]
        trained = out * lora_b.requires_grad + into * lora_a.requires_grad
        each += lora_a.shape[0] * ((out + into) * (1 + backward) + trained * backward)
    return rows * each


def _dense(x: Tensor, p: float, pairs: tuple[Pair, ...]) -> int:
    """Multiply-adds that make ΔW and take its gradient apart, and those with x that W's do not include."""
    rows, size = math.prod(x.shape[:-1]), pairs[0][0].shape[0] * pairs[0][1].shape[1]
    beside = 2 * (p > 0) + any(map(_trained, pairs))
    made = sum(lora_a.shape[0] * (1 + _trained((lora_b, lora_a))) for lora_b, lora_a in pairs)
    return size * (made + rows * beside + _PASSES)
