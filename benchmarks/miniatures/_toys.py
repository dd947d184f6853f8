"""What several miniatures need: a change of W of known rank, and a layer that learns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn import LoRALinear


def change_of_rank(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """``rank`` equal directions of length 1."""
    u, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    return u @ v.T


def moved(
    change: Tensor,
    steps: int,
    every: int,
    make: Callable[[Any, Any], Any] | None,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """By how much W + ΔW has moved after learning ``change``, with a cosine a period of the schedule."""
    layer = LoRALinear(*change.shape, bias=False, **options)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, every)
    schedule = make(layer, optimizer) if make else None
    x = torch.randn(2 * change.shape[0], change.shape[0], generator=generator)
    want = x @ (before + change).T
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        rate.step()
        if schedule is not None:
            schedule.step()
    if hasattr(schedule, "finish"):
        schedule.finish()
    return layer.merged_weight() - before


def left(moved: Tensor, change: Tensor) -> float:
    """The part of the change that was not learnt."""
    return float((moved - change).norm() / change.norm())


def rank_of(matrix: Tensor, least: float = 0.1) -> float:
    """How many singular values are above ``least``."""
    return float(torch.linalg.matrix_rank(matrix.double(), atol=least))


class Beside(nn.Module):
    """Linears side by side."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in names:
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """All outputs."""
        return torch.stack([self.get_submodule(name)(x) for name in self.names])

    @torch.no_grad()
    def after(self, x: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """All outputs of W + its change."""
        linears: list[Any] = [self.get_submodule(name) for name in self.names]
        return torch.stack([x @ (one.weight + c).T for one, c in zip(linears, changes, strict=True)])
