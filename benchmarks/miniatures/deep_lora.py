"""Deep LoRA: what it learns is of low rank, however large r is."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_kernels.nn import LoRALinear

from ._change import fit, squared_error

CLAIM = (
    "of a change of rank 2 seen through 40 samples in 64 dimensions r = 48 learns 2 directions above 1 % of"
    " the first; LoRA learns more"
)
WIDTH, RANK, SAMPLES, R, STEPS = 64, 2, 40, 48, 1000


def run(seed: int) -> dict[str, float]:
    """How many singular values of ΔW are above 1 % of the first, and the loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    left, right = (torch.randn(WIDTH, RANK, generator=generator) for _ in range(2))
    change = left @ right.T / WIDTH
    figures = {}
    for name, method in (("deep", "deep_lora"), ("LoRA", "lora")):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method=method)
        want = x @ (layer.weight.detach() + change).T
        figures[f"{name}, loss"] = fit(partial(squared_error, layer, x, want), layer, STEPS, 1e-2)
        figures[f"{name}, rank"] = _rank(layer.adapters["default"].delta().detach())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Two directions in every seed, LoRA more."""
    return all(one["deep, rank"] == RANK < one["LoRA, rank"] for one in figures)


def _rank(delta: Tensor) -> float:
    values = torch.linalg.svdvals(delta.double())
    return float((values > 0.01 * values[0]).sum())
