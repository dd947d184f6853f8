"""The Gaussian start: A of N(0, 1/r²), here more than twice as large as LoRA's."""

from __future__ import annotations

from ._pretrained import adapted, losses, pretrained

CLAIM = "a pretrained net tuned to other classes: after 30 steps at one rate the loss is below LoRA's"
STEPS, LR = 30, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss on the target after a few steps, by start."""
    tuning = pretrained(seed)
    starts = {"LoRA": {}, "Gaussian": {"init_lora_weights": "gaussian"}}
    return {name: losses(tuning, adapted(tuning, **start), STEPS, LR)[0] for name, start in starts.items()}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["Gaussian"] < one["LoRA"] for one in figures)
