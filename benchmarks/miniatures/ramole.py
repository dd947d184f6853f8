"""RAMoLE: a small router learns which of the retrieved adapters fits a token."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear

from ._fit import fit
from ._tasks import RANK, copy_of, error, tasks

CLAIM = (
    "three planted adapters: a trained router leaves a fifth of what their mean and averaged factors leave"
)
COUNT, STEPS = 3, 300


def run(seed: int) -> dict[str, float]:
    """The part of the error that is left."""
    toy = tasks(seed, COUNT)
    options = {"experts": COUNT, "router_rank": 8}
    layer = LoRALinear.from_linear(
        copy_of(toy.linear), r=RANK, lora_alpha=RANK, method="ramole", method_options=options
    )
    one = layer.adapters["default"]
    u, s, vh = torch.linalg.svd(toy.changes)
    lora_bs, lora_as = u[:, :, :RANK] * s[:, None, :RANK], vh[:, :RANK]
    with torch.no_grad():
        one.lora_A.copy_(lora_as.flatten(0, 1))
        one.lora_B.copy_(lora_bs.transpose(0, 1).flatten(1))
        base = toy.x @ toy.linear.weight.T
        mean = error(layer(toy.x), toy)  # a router of zeros
        fused = error(base + toy.x @ (lora_bs.mean(0) @ lora_as.mean(0)).T, toy)
    fit(lambda: (layer(toy.x) - toy.want).square().mean(), [one.router_A, one.router_B], STEPS, 2e-2)
    return {"mean": mean, "averaged factors": fused, "RAMoLE": error(layer(toy.x), toy)}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["RAMoLE"] < 0.2 * min(one["mean"], one["averaged factors"]) for one in figures)
