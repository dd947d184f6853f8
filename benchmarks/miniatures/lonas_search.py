"""LoNAS's search: smaller sub-networks that lose little."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import elastic
from lora_kernels.schedules import (
    Group,
    draw_sizes,
    middle_sizes,
    multiplications,
    search_subnetworks,
    slices_of,
)

CLAIM = (
    "after training on random sub-networks the search finds one with at most 0.75 of the multiplications and"
    " at most 1.5 x the loss of the whole"
)
WIDTH, HIDDEN, STEPS = 16, 48, 200
GROUPS = (
    Group("rank of up", (8, 6, 4, 2), (("up", "rank"),)),
    Group("rank of down", (8, 6, 4, 2), (("down", "rank"),)),
    Group("width", (48, 40, 32, 24, 16), (("up", "out_features"), ("down", "in_features"))),
)


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """y."""
        return self.down(torch.relu(self.up(x)))


def run(seed: int) -> dict[str, float]:
    """The loss and the multiplications of the whole, of the middle and of what the search likes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH))
    model = apply_lora(_MLP(), LoRAConfig(r=8, lora_alpha=16, target_modules=["up", "down"], method="lonas"))
    x, checks = (torch.randn(256, WIDTH, generator=generator) for _ in range(2))
    with torch.no_grad():
        want, wanted = teacher(x), teacher(checks)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with elastic(model, slices_of(GROUPS, draw_sizes(GROUPS, generator))):
            (model(x) - want).square().mean().backward()
        optimizer.step()

    def score() -> float:
        return -float((model(checks) - wanted).square().mean())

    front = search_subnetworks(model, GROUPS, score, evaluations=60, population=8, seed=seed)
    slices = slices_of(GROUPS, middle_sizes(GROUPS))
    with elastic(model, slices), torch.no_grad():
        middle = -score()
    with torch.no_grad():
        loss, macs = -score(), multiplications(model)
    small = [one for one in front if one.macs <= 0.75 * macs]
    return {
        "loss of the whole": loss,
        "loss of the middle": middle,
        "multiplications of the middle": multiplications(model, slices) / macs,
        "loss of the best within 0.75": min((-one.score for one in small), default=float("inf")),
        "sub-networks on the front": float(len(front)),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["loss of the best within 0.75"] <= 1.5 * one["loss of the whole"] for one in figures)
