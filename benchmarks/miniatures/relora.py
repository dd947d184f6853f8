"""ReLoRA: a change of rank 16 out of four restarts of rank 4."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import ReLoRA

CLAIM = "with r = 4 and four restarts learns a change of W of rank 16, of which LoRA with r = 4 misses most"
WIDTH, RANK, R, STEPS = 48, 16, 4, 800


def run(seed: int) -> dict[str, float]:
    """What is left of the change, and the rank by which W has moved, with restarts and without."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))
    figures = {}
    for name, restarts in (("LoRA", 1), ("ReLoRA", 4)):
        left, rank = _train(u @ v.T, STEPS // restarts, generator)
        figures.update({f"{name}, left": left, f"{name}, rank": rank})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """12 of 16 equal directions are 0.87 of the norm."""
    return all(
        one["ReLoRA, left"] < 0.01 and one["ReLoRA, rank"] == RANK and one["LoRA, left"] > 0.8
        for one in figures
    )


def _train(change: torch.Tensor, every: int, generator: torch.Generator) -> tuple[float, float]:
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-2)
    # A cosine a period: small steps before a merge.
    rate = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, every)
    schedule = ReLoRA(layer, optimizer, every=every, ratio=1.0)
    x = torch.randn(128, WIDTH, generator=generator)
    want = x @ (before + change).T
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        rate.step()
        schedule.step()
    moved = layer.weight.detach() - before
    rank = torch.linalg.matrix_rank(moved.double(), atol=0.1)
    return float((moved - change).norm() / change.norm()), float(rank)
