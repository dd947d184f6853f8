"""Expressive power: the construction is as near as any factors of its rank can come."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.init import expressive_adapters, expressive_bound

CLAIM = (
    "three frozen layers of width 12 become T up to singular value 3R+1 of the gap for R = 1 to 4, so exactly"
    " at 4, and trained factors stay above it"
)
WIDTH, DEPTH, STEPS = 12, 3, 400


def run(seed: int) -> dict[str, float]:
    """The spectral error of the construction and of trained factors, and the bound, by rank."""
    generator = torch.Generator().manual_seed(seed)
    *frozen, target = torch.randn(DEPTH + 1, WIDTH, WIDTH, generator=generator, dtype=torch.float64).unbind()
    found = {}
    for rank in (1, 2, 3, 4):
        pairs = expressive_adapters(frozen, target, rank)
        found[f"bound, {rank}"] = expressive_bound(frozen, target, rank)
        found[f"built, {rank}"] = _error(frozen, pairs, target).item()
    found["trained, 2"] = _trained(frozen, target, 2, generator)
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(
        all(abs(one[f"built, {rank}"] - one[f"bound, {rank}"]) < 1e-6 for rank in (1, 2, 3, 4))
        and one["built, 4"] < 1e-6
        and one["trained, 2"] >= one["bound, 2"]
        for one in figures
    )


def _error(frozen: list[Tensor], pairs: list[tuple[Tensor, Tensor]], target: Tensor) -> Tensor:
    product = torch.eye(WIDTH, dtype=torch.float64)
    for weight, (a, b) in zip(frozen, pairs, strict=True):
        product = (weight + b @ a) @ product
    return torch.linalg.matrix_norm(product - target, 2)


def _trained(frozen: list[Tensor], target: Tensor, rank: int, generator: torch.Generator) -> float:
    starts = torch.randn(len(frozen), rank, WIDTH, generator=generator, dtype=torch.float64) / 4
    pairs = [(start, torch.zeros_like(start.T)) for start in starts]
    factors = [factor.requires_grad_() for pair in pairs for factor in pair]
    optimizer = torch.optim.Adam(factors, lr=2e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _error(frozen, pairs, target).backward()
        optimizer.step()
        rate.step()
    return _error(frozen, pairs, target).item()
