"""LORS: a stack whose layers share a weight, near the unshared one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels.nn import LORSLinear

from ._change import fit

CLAIM = (
    "six layers on one weight with r = 4: 0.4 of the parameters, and less loss than the shared weight alone"
)
WIDTH, LAYERS, R, STEPS = 32, 6, 4, 200


def run(seed: int) -> dict[str, float]:
    """Parameters over the unshared stack's, and the losses on a random teacher of that shape."""
    torch.manual_seed(seed)
    x, teacher = torch.randn(128, WIDTH), [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    with torch.no_grad():
        want = _through(teacher, x)
    shared = nn.Linear(WIDTH, WIDTH)
    stacks = {
        "unshared": nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)),
        "shared": nn.ModuleList([shared] * LAYERS),
        "LORS": LORSLinear.stack(nn.Linear(WIDTH, WIDTH), LAYERS, R),
    }
    figures = {
        f"{name}, loss": fit(
            lambda stack=stack: (_through(stack, x) - want).square().mean(), stack, STEPS, 1e-2
        )
        for name, stack in stacks.items()
    }
    counts = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()}
    return {"parameters": counts["LORS"] / counts["unshared"], **figures}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["parameters"] < 0.45 and one["LORS, loss"] < one["shared, loss"] for one in figures)


def _through(stack: object, x: Tensor) -> Tensor:
    for layer in stack:
        x = x + torch.tanh(layer(x))
    return x
