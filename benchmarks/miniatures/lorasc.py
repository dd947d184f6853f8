"""LoRASC: a rank above the adapter's, by cycles of which a part stays."""

from __future__ import annotations

import torch

from lora_kernels.schedules import LoRASC

from ._toys import change_of_rank, left, moved, rank_of

CLAIM = "cycles of r = 4 with noise learn most of a change of rank 12, of which one LoRA of r = 4 misses 0.8"
WIDTH, RANK, R, CYCLES, STEPS = 32, 12, 4, 5, 600


def run(seed: int) -> dict[str, float]:
    """What is left of the change, by one LoRA and by cycles; the noise is out of W at the end."""
    generator = torch.Generator().manual_seed(seed)
    change = change_of_rank(WIDTH, RANK, generator)
    figures = {}
    for name, every, make in (("LoRA", STEPS, None), ("LoRASC", STEPS // CYCLES, _cycles)):
        got = moved(change, STEPS, every, make, generator, r=R, lora_alpha=R)
        figures.update({f"{name}, left": left(got, change), f"{name}, rank": rank_of(got)})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """8 of 12 equal directions are 0.82 of the norm."""
    return all(one["LoRA, left"] > 0.8 and one["LoRASC, left"] < 0.3 for one in figures)


def _cycles(model, optimizer):  # type: ignore[no-untyped-def]
    return LoRASC(model, optimizer, every=STEPS // CYCLES, alpha=0.9, noise=0.01)
