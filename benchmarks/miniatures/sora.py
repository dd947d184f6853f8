"""SoRA: the gates that a change does not need close."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import SoRASchedule

from ._change import random_change

CLAIM = (
    "of r = 8 it keeps 2 to 4 gates for a change of rank 2, and the compact LoRA leaves less than 5 % of it"
)
WIDTH, RANK, R, STEPS = 32, 2, 8, 900


def run(seed: int) -> dict[str, float]:
    """The gates that are open, and what the compact adapter has left of the change."""
    x, change = random_change(seed, WIDTH, RANK)
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method="sora")
    want = x @ (layer.weight.detach() + change).T
    adapter = layer.adapters["default"]
    # Without decay B grows as its gate closes; ten times the authors', for fewer steps.
    factors = {"params": [adapter.lora_A, adapter.lora_B], "weight_decay": 1.0}
    optimizer = torch.optim.AdamW([factors, {"params": [adapter.gate], "weight_decay": 0.0}], lr=1e-2)
    schedule = SoRASchedule(layer, xis=(0.0, 4e-3, 8e-3), steps=(STEPS // 3,) * 3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        schedule.step()
    small = adapter.compact()
    left = float((small.delta().detach() - change).norm() / change.norm())
    return {"open": float((adapter.gate != 0).sum()), "left": left}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(RANK <= one["open"] <= 2 * RANK and one["left"] < 0.05 for one in figures)
