"""LoRA-GA: training starts along the singular vectors of W's gradient."""

from __future__ import annotations

from lora_kernels import calibrate

from ._pretrained import adapted, loss_of, losses, pretrained

CLAIM = "a pretrained net tuned to other classes: after 30 steps at one rate the loss is below 0.9 of LoRA's"
STEPS, LR = 30, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss on the target after a few steps, by start."""
    tuning = pretrained(seed)
    statistics = calibrate(tuning.net, [tuning.target], ("gradient",), forward=loss_of)
    starts = {"LoRA": {}, "LoRA-GA": {"init_lora_weights": "lora_ga", "statistics": statistics}}
    return {name: losses(tuning, adapted(tuning, **start), STEPS, LR)[0] for name, start in starts.items()}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["LoRA-GA"] < 0.9 * one["LoRA"] for one in figures)
