"""Compacter's update: sums of Kronecker products beside a linear."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters

from ._planted import left

CLAIM = (
    "a change of rank 16 that is a sum of four Kronecker products (64 by 64): 192 numbers leave less of"
    " it than LoRA's 256 do"
)
WIDTH, N, STEPS = 64, 4, 250


def run(seed: int) -> dict[str, float]:
    """The part of the outputs' change that is left, the change's rank, and the numbers that train."""
    torch.manual_seed(seed)
    x, part = torch.randn(256, WIDTH), WIDTH // N
    change = sum(torch.kron(torch.randn(N, N), torch.randn(part, 1) @ torch.randn(1, part)) for _ in range(N))
    change = change / change.norm()
    figures = {"rank": float(torch.linalg.matrix_rank(change))}
    for name, options in (("Compacter", {"method": "compacter"}), ("LoRA", {"r": 2, "lora_alpha": 2})):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, **options)
        want = x @ (layer.weight.detach() + change).T
        figures[name] = left(layer, x, want, STEPS)
        figures[f"{name}, numbers"] = float(count_parameters(layer)[0])
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["Compacter"] < one["LoRA"] and one["Compacter, numbers"] < one["LoRA, numbers"] for one in figures
    )
