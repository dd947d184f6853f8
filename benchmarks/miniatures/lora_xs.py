"""LoRA-XS: r² numbers between singular vectors of W, which are worth more there than random bases."""

from __future__ import annotations

import torch

from lora_kernels.nn import count_parameters

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes with r² = 16 numbers a layer: the best of three rates leaves"
    " less than 0.7 of the loss that random bases leave"
)
STEPS, RATES, R = 100, (3e-3, 1e-2, 3e-2), 4


def run(seed: int) -> dict[str, float]:
    """The numbers that train, and the least loss on the target, by the bases."""
    tuning, figures = pretrained(seed), {}
    for name, start in (("singular vectors", True), ("random", False)):
        found = []
        for rate in RATES:
            torch.manual_seed(seed)
            model = adapted(tuning, R, method="lora_xs", init_lora_weights=start)
            found.append(losses(tuning, model, STEPS, rate)[0])
        figures[name] = min(found)
    return {"numbers": float(count_parameters(model)[0]), **figures}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["numbers"] == 2 * R**2 and one["singular vectors"] < 0.7 * one["random"] for one in figures
    )
