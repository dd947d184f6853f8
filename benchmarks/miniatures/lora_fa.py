"""LoRA-FA: A frozen, and with it x is not kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes with r = 16: a layer of 32 inputs keeps r numbers a row for its"
    " backward pass, LoRA's at least 32, and the best of three rates brings the loss below 0.02"
)
STEPS, RATES, R = 100, (3e-3, 1e-2, 3e-2), 16


def run(seed: int) -> dict[str, float]:
    """What the first layer keeps a row, and the least loss on the target."""
    tuning, figures = pretrained(seed), {}
    for name, method in (("LoRA", "lora"), ("LoRA-FA", "lora_fa")):
        figures[f"{name}, kept a row"] = _kept(adapted(tuning, R, method=method)[0], tuning.target[0])
        found = [losses(tuning, adapted(tuning, R, method=method), STEPS, rate)[0] for rate in RATES]
        figures[f"{name}, loss"] = min(found)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["LoRA-FA, kept a row"] == R and one["LoRA, kept a row"] >= 2 * R and one["LoRA-FA, loss"] < 0.02
        for one in figures
    )


def _kept(layer: nn.Module, x: Tensor) -> float:
    """The numbers a row of x that a forward pass saves."""
    rows = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (rows.append(t), t)[1], lambda t: t):
        layer(x)
    return float(sum(t.shape[-1] for t in {id(t): t for t in rows}.values() if t.shape[0] == len(x)))
