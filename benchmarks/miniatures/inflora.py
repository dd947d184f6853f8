"""InfLoRA: a second task that leaves the first alone."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import InfLoRA

CLAIM = "a second task moves the outputs of the first by less than 1 % of what it does through plain LoRA"
WIDTH, ROWS, R, STEPS = 32, 8, 4, 100


def run(seed: int) -> dict[str, float]:
    """By how much the second task moves the first one's outputs, and what is left of its own error."""
    figures = {}
    for name in ("LoRA", "InfLoRA"):
        moved, left = _two_tasks(seed, name == "InfLoRA")
        figures.update({f"{name}, moved": moved, f"{name}, left": left})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """The first task stays, and the second is learnt too."""
    return all(
        one["InfLoRA, moved"] < 0.01 * one["LoRA, moved"] and one["InfLoRA, left"] < 0.9 for one in figures
    )


def _two_tasks(seed: int, designed: bool) -> tuple[float, float]:
    torch.manual_seed(seed)
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R)
    schedule = InfLoRA(layer, 2, share=1.0) if designed else None
    tasks = [(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)) for _ in range(2)]
    first = torch.empty(0)
    for x, want in tasks:
        if schedule is not None:
            schedule.begin_task(layer, [x])
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-2)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (layer(x) - want).square().mean()
            loss.backward()
            optimizer.step()
        if schedule is not None:
            schedule.end_task(layer, [x])
        first = first if first.numel() else layer(tasks[0][0]).detach()
    moved = (layer(tasks[0][0]) - first).norm() / first.norm()
    return moved.item(), loss.item() / tasks[1][1].square().mean().item()
