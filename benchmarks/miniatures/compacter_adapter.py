"""Compacter: a bottleneck of a fraction of the parameters learns a small task as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import CompacterAdapter

from ._fit import fit

CLAIM = "a fifth of a dense bottleneck's numbers come within 1.5 times its loss on a small regression"
WIDTH, REDUCTION, STEPS = 64, 4, 300


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, WIDTH // REDUCTION), nn.Linear(WIDTH // REDUCTION, WIDTH)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.gelu(self.down(h), approximate="tanh"))


def run(seed: int) -> dict[str, float]:
    """The loss that is left on data that was not seen, over that before training, and the parameters."""
    torch.manual_seed(seed)
    h, unseen = torch.randn(512, WIDTH), torch.randn(512, WIDTH)
    direction = torch.randn(WIDTH, 1) / WIDTH**0.5
    back = torch.randn(1, WIDTH)
    found = {}
    for name, adapter in (("dense", _Dense()), ("Compacter", CompacterAdapter(WIDTH, REDUCTION))):

        def loss(x: Tensor, adapter: nn.Module = adapter) -> Tensor:
            return (adapter(x) - x - torch.tanh(x @ direction) @ back).square().mean()

        before = float(loss(unseen).detach())
        fit(lambda loss=loss: loss(h), adapter.parameters(), STEPS, 1e-2)
        found[f"{name} loss"] = float(loss(unseen).detach()) / before
        found[f"{name} parameters"] = float(sum(p.numel() for p in adapter.parameters()))
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """Over all seeds."""
    fewer = all(one["Compacter parameters"] < 0.2 * one["dense parameters"] for one in figures)
    return fewer and all(one["Compacter loss"] < 1.5 * one["dense loss"] for one in figures)
