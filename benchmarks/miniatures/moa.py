"""Mixture-of-LoRAs: experts trained apart, and a router that learns the domain of a sequence."""

from __future__ import annotations

import torch

from lora_kernels import LoRAConfig
from lora_kernels.nn import LoRALinear, fill_experts, side_inputs
from lora_kernels.routing import domain_loss

from ._fit import fit
from ._tasks import RANK, copy_of, error, lora, tasks

CLAIM = (
    "three domains: the router knows 99 % of the sequences, and the mixture leaves a tenth of the error"
    " of one LoRA for all"
)
COUNT = 3


def run(seed: int) -> dict[str, float]:
    """The part of the error that is left, and how often the router is right."""
    toy = tasks(seed, COUNT)
    layer = LoRALinear.from_linear(copy_of(toy.linear), r=RANK, adapter_name="0")
    for i in range(COUNT):
        if i:
            layer.add_adapter(str(i), LoRAConfig(RANK, lora_alpha=RANK))
        own = lora(toy, RANK, i)[0].adapters["default"]
        layer.adapters[str(i)].load_state_dict(own.state_dict())
        layer.adapters[str(i)].scaling = own.scaling
    options = {"method": "moa", "method_options": {"experts": COUNT}}
    layer.add_adapter("moa", LoRAConfig(RANK, lora_alpha=RANK, **options))
    fill_experts(layer, [str(i) for i in range(COUNT)], "moa")
    layer.set_adapter("moa")
    mixture = layer.adapters["moa"]

    def loss() -> torch.Tensor:
        with side_inputs(layer, domain=toy.task) as call:
            layer(toy.x)
        return domain_loss(call, toy.task)

    fit(loss, [mixture.router], 100, 2e-2)
    right = (toy.x.mean(1) @ mixture.router.T).argmax(-1) == toy.task
    shared = lora(toy, RANK * COUNT)[1]
    return {"one LoRA": shared, "MoA": error(layer(toy.x), toy), "right": float(right.float().mean())}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["right"] >= 0.99 and one["MoA"] < 0.1 * one["one LoRA"] for one in figures)
