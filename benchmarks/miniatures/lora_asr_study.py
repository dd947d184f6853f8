"""A high-rank warm-up: the low rank that goes on starts where a wide one has been."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import RankWarmup

from ._toys import change_of_rank, left

CLAIM = "a planted change of rank 2: 16 ranks for 30 steps, then 2, end nearer to it than 2 ranks for all 60"
WIDTH, R_HI, R_LO, STEPS = 32, 16, 2, 60


def run(seed: int) -> dict[str, float]:
    """The part of the change that is left."""
    return {"warm-up": _left(seed, R_HI), "rank 2": _left(seed, R_LO)}


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(one["warm-up"] <= one["rank 2"] for one in figures)


def _left(seed: int, rank: int) -> float:
    torch.manual_seed(seed)
    change = change_of_rank(WIDTH, R_LO, torch.Generator().manual_seed(seed))
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=rank, lora_alpha=rank)
    before = layer.weight.detach().clone()
    x = torch.randn(2 * WIDTH, WIDTH)
    want = x @ (before + change).T
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    schedule = RankWarmup(layer, optimizer, r_lo=R_LO, steps=STEPS // 2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        schedule.step()
    return left(layer.merged_weight() - before, change)
