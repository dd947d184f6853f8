"""SiRA: a sparse choice of small experts at the cost of two of them."""

from __future__ import annotations

from lora_kernels.nn import LoRALinear, side_inputs
from lora_kernels.routing import balance_loss

from ._fit import fit
from ._tasks import copy_of, error, lora, tasks

CLAIM = "four tasks: 2 of 8 experts of r = 2 leave less than half the error of a LoRA of r = 4"
STEPS = 250


def run(seed: int) -> dict[str, float]:
    """The part of the error that is left."""
    toy = tasks(seed, 4)
    options = {"experts": 8, "top_k": 2, "capacity": 1.5, "expert_dropout": 0.0}
    layer = LoRALinear.from_linear(
        copy_of(toy.linear), r=2, lora_alpha=2, method="sira", method_options=options
    )

    def loss():
        with side_inputs(layer) as call:
            y = layer(toy.x)
        return (y - toy.want).square().mean() + 1e-2 * balance_loss(call)

    fit(loss, layer.adapters.parameters(), STEPS, 2e-2)
    return {"LoRA": lora(toy, 4, steps=STEPS)[1], "SiRA": error(layer.eval()(toy.x), toy)}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["SiRA"] < 0.5 * one["LoRA"] for one in figures)
