"""LoRETTA_rep: factors that are tensor trains."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters

from ._planted import left

CLAIM = (
    "a change of rank 8 (256 by 256) that trains of rank 3 make: with less than a tenth of the numbers of"
    " LoRA with r = 8 it leaves less than half of what LoRA with r = 1 leaves, which has more"
)
WIDTH, R, INNER, STEPS = 256, 8, 3, 300


def run(seed: int) -> dict[str, float]:
    """The part of the outputs' change that is left, and the numbers that train."""
    torch.manual_seed(seed)
    trains = {"method": "loretta_rep", "method_options": {"tensor_rank": INNER}}
    planted = {**trains, "method_options": {"tensor_rank": INNER, "zero_init": False}}
    teacher = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, **planted)
    change = teacher.adapters["default"].delta().detach()
    change = change * WIDTH**0.5 / change.norm()
    x, figures = torch.randn(512, WIDTH), {}
    for name, r, options in (("LoRETTA", R, trains), ("LoRA, r = 1", 1, {})):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=r, lora_alpha=r, **options)
        want = x @ (layer.weight.detach() + change).T
        figures[name] = left(layer, x, want, STEPS, 2e-2)
        figures[f"numbers, {name}"] = float(count_parameters(layer)[0])
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["LoRETTA"] < 0.5 * one["LoRA, r = 1"]
        and one["numbers, LoRETTA"] < 0.1 * R * 2 * WIDTH
        and one["numbers, LoRETTA"] < one["numbers, LoRA, r = 1"]
        for one in figures
    )
