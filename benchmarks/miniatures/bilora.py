"""BiLoRA: values that learn from other samples than the vectors overfit less."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import BiLoRA

CLAIM = "on 48 noisy samples the gap between test and training loss is smaller with two levels than with one"
WIDTH, R, STEPS, NOISE = 32, 8, 150, 0.5


def run(seed: int) -> dict[str, float]:
    """Training and test loss, all samples in one level or e on a third of them."""
    figures = {}
    for name in ("joint", "two levels"):
        train, test = _train(seed, name == "two levels")
        figures.update({f"{name}, gap": test - train, f"{name}, test": test})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(one["two levels, gap"] < one["joint, gap"] for one in figures)


def _train(seed: int, two: bool) -> tuple[float, float]:
    torch.manual_seed(seed)
    options = {"method": "bilora", "method_options": {"values": "softmax"}}
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R * R, **options)
    change = torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH) / WIDTH
    x, test = torch.randn(48, WIDTH), torch.randn(512, WIDTH)
    want = x @ (layer.weight.detach() + change).T + NOISE * torch.randn(48, WIDTH)
    clean = test @ (layer.weight.detach() + change).T

    def loss(rows: Tensor) -> Tensor:
        return (layer(x[rows]) - want[rows]).square().mean()

    every = torch.arange(48)
    lower = every[:32] if two else every
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    schedule = BiLoRA(layer, loss, *map(itertools.repeat, (lower, every[32:])), lr=3e-2) if two else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(lower).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    with torch.no_grad():
        return loss(every).item(), (layer(test) - clean).square().mean().item() + NOISE**2
