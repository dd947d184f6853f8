"""LORPMAN: one model for all trade-offs of two conflicting regressions."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import draw_preference, orthogonal_penalty
from lora_kernels.nn import side_inputs

CLAIM = "over 11 preferences each loss falls as its task's share rises; 8 points or more are not dominated"


def run(seed: int) -> dict[str, float]:
    """How often a loss falls with its share, and how many of 11 points no other one dominates."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(128, 8)
    tasks = torch.stack([torch.sin(x[:, :1]), -torch.sin(x[:, :1]) + 0.3 * x[:, 1:2]])
    apply_lora(model, LoRAConfig(r=4, target_modules=["0", "2"], method="lorpman"))
    base = [p for p in model.parameters() if not p.requires_grad]
    for p in base:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(400):
        if step == 200:
            for p in base:
                p.requires_grad_(False)
                p.grad = None
        p = draw_preference(2)
        with side_inputs(model, preference=p):
            losses = (model(x) - tasks).square().mean((1, 2))
        optimizer.zero_grad()
        (p @ losses + orthogonal_penalty(model)).backward()
        optimizer.step()
    front = []
    for share in torch.linspace(0, 1, 11).tolist():
        with torch.no_grad(), side_inputs(model, preference=torch.tensor([share, 1 - share])):
            front.append((model(x) - tasks).square().mean((1, 2)).tolist())
    falls = [(a[0] > b[0]) + (a[1] < b[1]) for a, b in itertools.pairwise(front)]
    kept = [one for one in front if not any(all(p < q for p, q in zip(o, one, strict=True)) for o in front)]
    return {"falls": sum(falls) / 20, "kept": float(len(kept))}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["falls"] == 1 and one["kept"] >= 8 for one in figures)
