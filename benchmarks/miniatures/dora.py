"""DoRA: lengths of rows apart from their directions."""

from __future__ import annotations

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes: after 30 steps at one rate and rank the loss is below LoRA's"
)
STEPS, LR = 30, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss on the target after a few steps, by start."""
    tuning = pretrained(seed)
    starts = {"LoRA": {}, "DoRA": {"method": "dora"}}
    return {name: losses(tuning, adapted(tuning, **start), STEPS, LR)[0] for name, start in starts.items()}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["DoRA"] < one["LoRA"] for one in figures)
