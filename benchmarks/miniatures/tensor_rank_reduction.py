"""Rank reduction: a model that trains beside its decomposition loses less by it."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.compress import factorise
from lora_kernels.schedules import RankReducer

CLAIM = (
    "cut to the ranks that the dual training found, it has at most 0.7 of the test loss of a model that"
    " trained alone and was cut to them, with less than half of the numbers"
)
WIDTH, HIDDEN, STEPS, EPOCH = 16, 48, 450, 15


def run(seed: int) -> dict[str, float]:
    """Test losses of both, before and after the cut, and the part of the numbers that is left."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH))
    x, checks = torch.randn(256, WIDTH), torch.randn(256, WIDTH)
    with torch.no_grad():
        want, wanted = teacher(x), teacher(checks)
    found: dict[str, float] = {}
    ranks: dict[str, list[int]] = {}
    for name in ("dual", "plain"):
        torch.manual_seed(seed)
        shapes = ((WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, WIDTH))
        first, second, third = (nn.Linear(*shape) for shape in shapes)
        model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
        size = sum(p.numel() for p in model.parameters())
        reducer = RankReducer(model, every=EPOCH, lam=1e-2, eps=0.1, rate=0.95)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (model(x) - want).square().mean()
            (loss + reducer.penalty() if name == "dual" else loss).backward()
            optimizer.step()
            if name == "dual":
                reducer.step()
        ranks = {one: list(got) for one, got in reducer.ranks.items()} if name == "dual" else ranks
        with torch.no_grad():
            found[f"{name}, whole"] = float((model(checks) - wanted).square().mean())
            factorise(model, {one: got[0] for one, got in ranks.items()})
            found[f"{name}, cut"] = float((model(checks) - wanted).square().mean())
        found["numbers"] = sum(p.numel() for p in model.parameters()) / size
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["dual, cut"] <= 0.7 * one["plain, cut"] and one["numbers"] < 0.5 for one in figures)
