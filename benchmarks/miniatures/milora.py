"""MiLoRA: the least singular directions of W train, so that what it does most stays."""

from __future__ import annotations

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes until its loss is below 0.5: the loss on what it knew is below"
    " PiSSA's, in each of three nets a seed"
)
STEPS, LR = 600, 1e-3


def run(seed: int) -> dict[str, float]:
    """The losses on the source, net by net."""
    figures = {}
    for k in range(3):
        tuning = pretrained(seed + 10 * k)
        for name, start in (("PiSSA", "pissa"), ("MiLoRA", "milora")):
            model = adapted(tuning, init_lora_weights=start)
            _, figures[f"{name}, net {k + 1}"] = losses(tuning, model, STEPS, LR, below=0.5)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every net of every seed."""
    return all(one[f"MiLoRA, net {k + 1}"] < one[f"PiSSA, net {k + 1}"] for one in figures for k in range(3))
