"""RoseLoRA: an edit that touches few numbers of W."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import RoseLoRA

CLAIM = "an edit is learnt through at most 4 % of the numbers of W, of which plain LoRA changes most"
WIDTH, R, STEPS = 64, 8, 60


def run(seed: int) -> dict[str, float]:
    """What is left of the edit, how much others move, and the part of W that changes."""
    figures = {}
    for name in ("LoRA", "RoseLoRA"):
        got = _edit(seed, name == "RoseLoRA")
        figures.update({f"{name}, {key}": value for key, value in got.items()})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Sparse, and the edit is there."""
    return all(
        one["RoseLoRA, density"] <= 0.04 and one["LoRA, density"] > 0.5 and one["RoseLoRA, left"] < 0.1
        for one in figures
    )


def _edit(seed: int, sparse: bool) -> dict[str, float]:
    torch.manual_seed(seed)
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R)
    keys = torch.randn(32, WIDTH)
    before = layer(keys).detach()
    # The new answer differs in two of its numbers.
    want = before[0].clone()
    want[:2] += 3.0
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=2e-2)
    schedule = RoseLoRA(layer, density=0.05, t_i=3, t_f=30) if sparse else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(keys[0]) - want).square().sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    after, delta = layer(keys).detach(), layer.adapters["default"].delta().detach()
    left = (after[0] - want).norm() / (before[0] - want).norm()
    return {
        "left": left.item(),
        "others": (after[1:] - before[1:]).norm().item() / before[1:].norm().item(),
        "density": delta.ne(0).float().mean().item(),
    }
