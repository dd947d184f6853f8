"""LoRETTA_adp: a bottleneck of tensor trains beside a linear, which is more than a matrix."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters

from ._planted import left

CLAIM = (
    "a planted bottleneck of width 16 with tanh (64 wide): it leaves less than 0.8 of what LoRA of as"
    " many ranks leaves, with less than half of its numbers"
)
WIDTH, R, STEPS = 64, 16, 300


def run(seed: int) -> dict[str, float]:
    """The part of the outputs' change that is left, and the numbers that train."""
    torch.manual_seed(seed)
    trains = {"method": "loretta_adp", "method_options": {"tensor_rank": 5}}
    planted = {**trains, "method_options": {"tensor_rank": 5, "zero_init": False}}
    teacher = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, **planted)
    adapter, x = teacher.adapters["default"], 2 * torch.randn(512, WIDTH)
    lora_a, lora_b = (factor.detach() for factor in adapter.contracted())
    h = x @ lora_a.T
    branch = torch.tanh(2 * h / h.std()) @ lora_b.T
    branch, figures = branch / branch.std(), {}
    for name, options in (("LoRETTA", trains), ("LoRA", {})):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, **options)
        want = x @ layer.weight.detach().T + branch
        figures[name] = left(layer, x, want, STEPS, 1e-2)
        figures[f"numbers, {name}"] = float(count_parameters(layer)[0])
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["LoRETTA"] < 0.8 * one["LoRA"] and one["numbers, LoRETTA"] < 0.5 * one["numbers, LoRA"]
        for one in figures
    )
