"""Training that several miniatures share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def fit(loss: Callable[[], Tensor], parameters: Iterable[Tensor], steps: int, lr: float) -> float:
    """The loss after so many steps of Adam on a cosine, over the loss before."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = float(loss().detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return float(loss().detach()) / first
