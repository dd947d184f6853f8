"""Asymmetry: with one factor fixed at random, training B leaves less than training A."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.nn import LoRALinear

from ._change import fit, squared_error

CLAIM = (
    "40 by 40, r = 4, inputs of unequal variance: B trained under a random A leaves less than A trained under"
    " a random B; with inputs of equal variance they leave the same to 5 %"
)
WIDTH, R, ROWS, STEPS = 40, 4, 400, 250


def run(seed: int) -> dict[str, float]:
    """The part of the squared error that is left, by what trains and the inputs."""
    torch.manual_seed(seed)
    change = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    scales = {"equal": torch.ones(WIDTH), "unequal": torch.linspace(0.1, 2, WIDTH)}
    figures = {}
    for inputs, scale in scales.items():
        x = torch.linalg.qr(torch.randn(ROWS, WIDTH))[0] * ROWS**0.5 * scale
        for fixed, trained in (("A", "B"), ("B", "A")):
            left = torch.tensor([_left(x, change, fixed) for _ in range(3)])
            figures[f"{inputs}, {trained} trains"] = float(left.mean())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["unequal, B trains"] < one["unequal, A trains"]
        and abs(one["equal, B trains"] / one["equal, A trains"] - 1) < 0.05
        for one in figures
    )


def _left(x: Tensor, change: Tensor, fixed: str) -> float:
    options = {"init_lora_weights": "asym", "method_options": {"freeze": fixed}}
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, **options)
    base = x @ layer.weight.detach().T
    want = base + x @ change.T
    return fit(lambda: squared_error(layer, x, want), layer, STEPS, 5e-2) / float(
        (want - base).square().mean()
    )
