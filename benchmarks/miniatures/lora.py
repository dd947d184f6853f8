"""LoRA: a change of rank 4 is learnt by r = 4 and not by r = 3."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear

CLAIM = "fits a change of W of rank 4 to 1 % with r = 4; with r = 3 the last direction is missing"
WIDTH, RANK, STEPS = 32, 4, 200


def run(seed: int) -> dict[str, float]:
    """The part of the change that is left after training, by rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, WIDTH, generator=generator)
    u, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))
    return {f"r={r}": _left(x, u @ v.T, r) for r in (RANK - 1, RANK)}


def holds(figures: list[dict[str, float]]) -> bool:
    """One of four equal directions is 0.5 of the norm."""
    return all(one["r=4"] < 0.01 and 0.4 < one["r=3"] < 0.6 for one in figures)


def _left(x: torch.Tensor, change: torch.Tensor, r: int) -> float:
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=r, lora_alpha=r)
    want = x @ (layer.weight.detach() + change).T
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        schedule.step()
    delta = layer.adapters["default"].delta().detach()
    return float((delta - change).norm() / change.norm())
