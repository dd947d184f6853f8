"""LISA: two of eight blocks at a time, a quarter of the gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lora_kernels.schedules import LISA

CLAIM = (
    "a trained net of 8 residual blocks tuned to a changed task through noise: with 2 blocks at a time their"
    " gradients take a quarter, and the loss on unseen samples is within 1.25 of that of all blocks"
)
WIDTH, BLOCKS, OUT, STEPS, ROWS = 16, 8, 4, 150, 96


def run(seed: int) -> dict[str, float]:
    """The losses on unseen samples before and after, and the part of the blocks' gradients that is there."""
    torch.manual_seed(seed)
    base, teacher = _Net(), _Net()
    x, unseen = torch.randn(ROWS, WIDTH), torch.randn(512, WIDTH)
    with torch.no_grad():
        known = teacher(unseen)
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        want, of_unseen = teacher(x), teacher(unseen)
        want = want + 0.3 * torch.randn_like(want)
    _train(base, unseen, known, BLOCKS, seed)
    figures = {"before": _loss(base, unseen, of_unseen).item()}
    for name, n_active in (("full", BLOCKS), ("LISA", 2)):
        model = copy.deepcopy(base)
        figures["gradients"] = _train(model, x, want, n_active, seed)
        figures[name] = _loss(model, unseen, of_unseen).item()
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Exactly a quarter, and the loss."""
    return all(
        one["gradients"] == 0.25 and one["LISA"] < 1.25 * one["full"] < one["before"] for one in figures
    )


def _train(model: nn.Module, x: Tensor, want: Tensor, n_active: int, seed: int) -> float:
    """Trains; the part of the blocks' gradients that there was at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = LISA(model, model.blocks, n_active=n_active, interval=10, seed=seed)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(model, x, want).backward()
        held = sum(p.grad.numel() for p in model.blocks.parameters() if p.grad is not None)
        optimizer.step()
        schedule.step()
        rate.step()
    return held / sum(p.numel() for p in model.blocks.parameters())


def _loss(model: nn.Module, x: Tensor, want: Tensor) -> Tensor:
    return (model(x) - want).square().mean()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class _Net(nn.Module):
    """Blocks, and a head that always trains."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)
