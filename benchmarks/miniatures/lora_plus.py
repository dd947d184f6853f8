"""LoRA+: B learns faster than A."""

from __future__ import annotations

import torch

from lora_kernels.optim import lora_plus

from ._pretrained import adapted, loss_of, pretrained

CLAIM = (
    "a pretrained net tuned to other classes: with B sixteen times as fast as A the best of four rates"
    " leaves less loss after 30 steps than the best of four with one rate for both"
)
STEPS, RATIO, RATES = 30, 16, (1e-3, 3e-3, 1e-2, 3e-2)


def run(seed: int) -> dict[str, float]:
    """The least loss on the target, and the rate of A that gave it."""
    tuning, figures = pretrained(seed), {}
    for ratio, slower in ((1, 1), (RATIO, 4)):  # √16: the two rates on both sides of the one
        found = {}
        for rate in (one / slower for one in RATES):
            torch.manual_seed(seed)
            model = adapted(tuning)
            optimizer = lora_plus(model, torch.optim.Adam, lr=rate, ratio=ratio)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, tuning.target).backward()
                optimizer.step()
            found[rate] = float(loss_of(model, tuning.target).detach())
        best = min(found, key=found.get)
        figures[f"ratio {ratio}, loss"], figures[f"ratio {ratio}, rate"] = found[best], best
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one[f"ratio {RATIO}, loss"] < one["ratio 1, loss"] for one in figures)
