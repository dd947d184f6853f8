"""LoFiT: the first stage finds the heads that matter, and offsets of these do more than those of others."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import lofit_heads

from ._planted import left

CLAIM = "scales name the 2 planted of 8 heads; offsets of these leave < 5 % of a shift, of 2 others > 50 %"
HEADS, WIDTH = 8, 8


def run(seed: int) -> dict[str, float]:
    """How many planted heads the first stage finds, and what is left with its choice and with another."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randperm(HEADS, generator=generator)[:2].tolist()
    # Inputs off centre, so that a scale can shift a head too.
    x = torch.randn(128, HEADS, WIDTH, generator=generator) + 1
    linear = nn.Linear(HEADS * WIDTH, 4 * HEADS * WIDTH)
    shift = torch.zeros(HEADS, WIDTH)
    shift[planted] = torch.randn(2, WIDTH, generator=generator).sign()
    want = linear((x + shift).flatten(1)).detach()
    state = linear.state_dict()

    def model(**options: object) -> nn.Module:
        fresh = nn.Sequential(nn.Linear(HEADS * WIDTH, 4 * HEADS * WIDTH))
        fresh[0].load_state_dict(state)
        options = {"heads": HEADS, **options}
        return apply_lora(fresh, LoRAConfig(method="lofit", target_modules=["0"], method_options=options))

    scales = model(stage="scale")
    left(scales, x.flatten(1), want)
    chosen = lofit_heads(scales, 2)["0"]
    others = [head for head in range(HEADS) if head not in planted][:2]
    return {
        "found": float(len({*chosen} & {*planted})),
        "left, chosen": left(model(chosen={"0": chosen}), x.flatten(1), want),
        "left, others": left(model(chosen={"0": others}), x.flatten(1), want),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """For each seed."""
    return all(
        one["found"] == 2 and one["left, chosen"] < 0.05 and one["left, others"] > 0.5 for one in figures
    )
