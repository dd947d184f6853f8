"""SAML: a router of utterances averages the factors of experts."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.nn import LoRALinear, side_inputs
from lora_kernels.routing import UtteranceRouter

from ._fit import fit
from ._tasks import WIDTH, copy_of, error, lora, tasks

CLAIM = (
    "four speakers: averaged experts leave less than half the error of one LoRA that trains as many numbers"
)
EXPERTS, STEPS = 4, 200


def run(seed: int) -> dict[str, float]:
    """The part of the error that is left, and the numbers that train over the LoRA's."""
    toy = tasks(seed, EXPERTS)
    options = {"method": "saml", "method_options": {"experts": EXPERTS}}
    layer = LoRALinear.from_linear(copy_of(toy.linear), r=2, lora_alpha=2, **options)
    router = UtteranceRouter(WIDTH, EXPERTS)

    def outputs() -> torch.Tensor:
        with side_inputs(layer, expert_weights=router(toy.x)):
            return layer(toy.x)

    trained = [*layer.adapters.parameters(), *router.parameters()]
    fit(lambda: (outputs() - toy.want).square().mean(), trained, STEPS, 2e-2)
    rank = sum(p.numel() for p in trained) // (2 * WIDTH) + 1
    one, left = lora(toy, rank, steps=STEPS)
    assert isinstance(one, nn.Linear)
    return {"LoRA": left, "SAML": error(outputs(), toy), "rank of the LoRA": rank}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["SAML"] < 0.5 * one["LoRA"] for one in figures)
