"""loralib's MergedLinear: LoRA of the query and the value in one linear."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters

from ._planted import left

CLAIM = (
    "query, key and value in one linear, changes of rank 4 of the first and the third: both are learnt to"
    " 1 %, the key's rows stay, and a LoRA of as many numbers leaves over a tenth"
)
WIDTH, R, STEPS = 32, 4, 300


def run(seed: int) -> dict[str, float]:
    """The part of the outputs' change that is left, by how much key's rows moved, and the numbers."""
    torch.manual_seed(seed)
    x = torch.randn(128, WIDTH)
    changes = [torch.randn(WIDTH, R) @ torch.randn(R, WIDTH) / WIDTH for _ in range(2)]
    change = torch.cat([changes[0], torch.zeros(WIDTH, WIDTH), changes[1]])
    merged = {"method": "merged_linear", "method_options": {"enable_lora": [True, False, True]}}
    figures = {}
    for name, options in (("MergedLinear", merged), ("LoRA", {})):
        layer = LoRALinear(WIDTH, 3 * WIDTH, bias=False, r=R, lora_alpha=R, **options)
        want = x @ (layer.weight.detach() + change).T
        figures[name] = left(layer, x, want, STEPS)
        delta = layer.adapters["default"].delta().detach()
        figures[f"{name}, key moved"] = float(delta[WIDTH : 2 * WIDTH].norm())
        figures[f"{name}, numbers"] = float(count_parameters(layer)[0])
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """All of it, in every seed."""
    return all(
        one["MergedLinear"] < 0.01
        and one["MergedLinear, key moved"] == 0
        and one["MergedLinear, numbers"] <= one["LoRA, numbers"]
        and one["LoRA"] > 0.1
        for one in figures
    )
