"""PeriodicLoRA: a change of full rank, two ranks a stage."""

from __future__ import annotations

import torch

from lora_kernels.schedules import PeriodicLoRA

from ._toys import left, moved, rank_of

CLAIM = "each of 4 stages of r = 2 adds two ranks and learns more of a change of full rank; one stage is LoRA"
WIDTH, R, STAGES, STEPS = 32, 2, 4, 150


def run(seed: int) -> dict[str, float]:
    """What is left of the change and the rank of the movement, by number of stages."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    figures = {}
    for stages in (1, STAGES):
        got = moved(
            change, STEPS * STAGES, STEPS * STAGES // stages, _stages(stages), generator, r=R, lora_alpha=R
        )
        figures.update({f"{stages} stages, left": left(got, change), f"{stages} stages, rank": rank_of(got)})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """The rank is 2 a stage, and a fifth more of the change is learnt."""
    last = f"{STAGES} stages"
    return all(
        one["1 stages, rank"] == R
        and one[f"{last}, rank"] == R * STAGES
        and one[f"{last}, left"] < one["1 stages, left"] - 0.2
        for one in figures
    )


def _stages(count: int):  # type: ignore[no-untyped-def]
    return lambda model, optimizer: PeriodicLoRA(model, optimizer, every=STEPS * STAGES // count)
