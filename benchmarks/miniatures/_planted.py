"""Training a layer on a change of its outputs that was planted."""

from __future__ import annotations

from typing import Any

import torch


def left(layer: Any, x: torch.Tensor, want: torch.Tensor, steps: int = 100, lr: float = 3e-2) -> float:
    """The part of the outputs' change that is left after training."""
    with torch.no_grad():
        start = (layer(x) - want).norm()
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((layer(x) - want).norm() / start)
