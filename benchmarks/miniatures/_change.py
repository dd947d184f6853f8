"""What several miniatures do: fit a change of a linear's weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def random_change(seed: int, width: int, rank: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Samples ``[rows, width]``, and a change of W of so many equal directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    u, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    return x, u @ v.T


def squared_error(layer: nn.Module, x: Tensor, want: Tensor) -> Tensor:
    """The mean of (y - want)²."""
    return (layer(x) - want).square().mean()


def fit(loss: Callable[[], Tensor], model: nn.Module, steps: int, lr: float = 3e-2) -> float:
    """Adam with a cosine over what trains; the loss at the end."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        rate.step()
    return float(loss().detach())


def left_of_change(layer: nn.Module, x: Tensor, change: Tensor, steps: int, lr: float = 3e-2) -> float:
    """The part of a change of the layer's W that its adapter has not learnt from x."""
    want = x @ (layer.weight.detach() + change).T
    fit(partial(squared_error, layer, x, want), layer, steps, lr)
    delta = layer.adapters["default"].delta().detach()
    return float((delta - change).norm() / change.norm())
