"""Flora: momentum as a random sketch."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_kernels.optim import Flora

CLAIM = (
    "a net 64 wide: momentum of rank 16 takes a quarter of the numbers of whole momentum, and the loss"
    " after 600 steps is within 2 of that with whole momentum"
)
WIDTH, RANK, STEPS, LR = 64, 16, 600, 3e-3


def run(seed: int) -> dict[str, float]:
    """The numbers of momentum a weight, and the loss over the first one."""
    torch.manual_seed(seed)
    x = torch.randn(256, WIDTH)
    base, teacher = _net(), _net()
    with torch.no_grad():
        want = teacher(x)
    figures = {}
    for name, rank in (("whole", WIDTH + 1), ("sketch", RANK)):  # a rank above the sides keeps it whole
        model = copy.deepcopy(base)
        optimizer = Flora(model.parameters(), lr=LR, rank=rank, kappa=50, beta1=0.9, seed=seed)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (model(x) - want).square().mean()
            loss.backward()
            optimizer.step()
            rate.step()
            losses.append(loss.item())
        state = optimizer.state[model[0].weight]
        held = [one.numel() for key, one in state.items() if isinstance(one, torch.Tensor) and one.dim() == 2]
        figures[f"{name}, numbers"] = float(sum(held))
        figures[f"{name}, loss"] = losses[-1] / losses[0]
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["sketch, numbers"] * WIDTH == one["whole, numbers"] * RANK
        and one["sketch, loss"] < 2 * one["whole, loss"]
        for one in figures
    )


def _net() -> nn.Sequential:
    linears = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
    return nn.Sequential(linears[0], nn.Tanh(), linears[1])
