"""LISA: two of eight blocks at a time, a quarter of the gradients."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.schedules import LISA

CLAIM = "with 2 of 8 blocks at a time gradients take a quarter, and the loss ends within 1.25 of full"
WIDTH, BLOCKS, STEPS = 24, 8, 400


def run(seed: int) -> dict[str, float]:
    """The loss after training, all blocks or two at a time, and the part of the gradients that is there."""
    losses = {"full": _train(seed, None)[0]}
    losses["LISA"], part = _train(seed, 2)
    return {**losses, "gradients": part}


def holds(figures: list[dict[str, float]]) -> bool:
    """Exactly a quarter, and the loss."""
    return all(one["gradients"] == 0.25 and one["LISA"] < 1.25 * one["full"] for one in figures)


def _train(seed: int, n_active: int | None) -> tuple[float, float]:
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)]
    model, size = nn.Sequential(*blocks), BLOCKS * (WIDTH**2 + WIDTH)
    x, want = torch.randn(64, WIDTH), 0.3 * torch.randn(64, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = LISA(model, model, n_active=n_active or BLOCKS, interval=10, seed=seed)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - want).square().mean()
        loss.backward()
        held = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        schedule.step()
    return loss.item(), held / size
