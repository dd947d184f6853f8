"""ReLoRA: a change of rank 16 out of four restarts of rank 4."""

from __future__ import annotations

import torch

from lora_kernels.schedules import ReLoRA

from ._toys import change_of_rank, left, moved, rank_of

CLAIM = "with r = 4 and four restarts learns a change of W of rank 16, of which LoRA with r = 4 misses most"
WIDTH, RANK, R, STEPS = 64, 16, 4, 1200


def run(seed: int) -> dict[str, float]:
    """What is left of the change, and the rank by which W has moved, with restarts and without."""
    generator = torch.Generator().manual_seed(seed)
    change = change_of_rank(WIDTH, RANK, generator)
    figures = {}
    for name, every in (("LoRA", STEPS), ("ReLoRA", STEPS // 4)):
        got = moved(change, STEPS, every, restarts(every), generator, r=R, lora_alpha=R)
        figures.update({f"{name}, left": left(got, change), f"{name}, rank": rank_of(got)})
    return figures


def restarts(every: int):  # type: ignore[no-untyped-def]
    """What makes the schedule; the last period is merged as well."""
    return lambda model, optimizer: ReLoRA(model, optimizer, every=every, ratio=1.0)


def holds(figures: list[dict[str, float]]) -> bool:
    """12 of 16 equal directions are 0.87 of the norm."""
    return all(
        one["ReLoRA, left"] < 0.01 and one["ReLoRA, rank"] == RANK and one["LoRA, left"] > 0.8
        for one in figures
    )
