"""PRILoRA: columns that read next to nothing lose their numbers."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import PRILoRA

CLAIM = "where 3 of 4 inputs are faint, half of A is pruned there alone and the loss is within 1.05 of LoRA's"
WIDTH, R, STEPS = 32, 4, 200


def run(seed: int) -> dict[str, float]:
    """The loss on new samples of both, and the part of the zeros that lies in faint columns."""
    loss, _ = _train(seed, False)
    pruned, part = _train(seed, True)
    return {"LoRA": loss, "PRILoRA": pruned, "zeros in faint columns": part}


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(
        one["PRILoRA"] <= 1.05 * one["LoRA"] and one["zeros in faint columns"] > 0.99 for one in figures
    )


def _train(seed: int, prunes: bool) -> tuple[float, float]:
    torch.manual_seed(seed)
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R)
    size = torch.full((WIDTH,), 1e-3)
    size[: WIDTH // 4] = 1.0
    x, test = torch.randn(64, WIDTH) * size, torch.randn(256, WIDTH) * size
    change = torch.randn(WIDTH, R) @ torch.randn(R, WIDTH) / WIDTH
    weight = layer.weight.detach() + change
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    schedule = PRILoRA(layer, every=20, ratio=0.5) if prunes else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - x @ weight.T - 0.05 * torch.ones(WIDTH)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    if schedule is not None:
        schedule.prune()
    zeros = layer.adapters["default"].lora_A == 0
    part = zeros[:, WIDTH // 4 :].sum() / zeros.sum().clamp(min=1)
    return (layer(test) - test @ weight.T).square().mean().item(), part.item()
