"""EVA: A starts as the principal components of what the layers read."""

from __future__ import annotations

from lora_kernels import calibrate

from ._pretrained import adapted, losses, pretrained

CLAIM = "a pretrained net tuned to other classes: after 30 steps at one rate the loss is below 0.9 of LoRA's"
STEPS, LR = 30, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss on the target after a few steps, by start."""
    tuning = pretrained(seed)
    batches = [tuning.target]
    statistics = calibrate(tuning.net, batches, ("activation_svd",), forward=lambda net, batch: net(batch[0]))
    starts = {"LoRA": {}, "EVA": {"init_lora_weights": "eva", "statistics": statistics}}
    return {name: losses(tuning, adapted(tuning, **start), STEPS, LR)[0] for name, start in starts.items()}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["EVA"] < 0.9 * one["LoRA"] for one in figures)
