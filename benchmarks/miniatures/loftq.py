"""LoftQ: factors that start as what quantising W has lost."""

from __future__ import annotations

import torch

from lora_kernels import quantize
from lora_kernels.nn import LoRALinear
from lora_kernels.ops.dequantize import dequantize

CLAIM = (
    "W of falling spectrum (64 by 64) in nf4, r = 8: the start is nearer to W than nf4 alone by a tenth"
    " or more, and nearer after five rounds than after one"
)
WIDTH, R = 64, 8


def run(seed: int) -> dict[str, float]:
    """‖W - Q - s B A‖ over ‖W‖: of nf4 alone, and after one and five rounds."""
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] for _ in range(2))
    weight = u * 0.95 ** torch.arange(WIDTH) @ v.T
    figures = {"nf4": float((weight - dequantize(quantize(weight, "nf4"))).norm() / weight.norm())}
    for rounds in (1, 5):
        linear = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight)
        options = {"init_lora_weights": "loftq", "method_options": {"loftq_iter": rounds}}
        layer = LoRALinear.from_linear(linear, r=R, lora_alpha=R, **options)
        figures[f"LoftQ, {rounds}"] = float((weight - layer.merged_weight()).norm() / weight.norm())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["LoftQ, 5"] < one["LoftQ, 1"] < 0.9 * one["nf4"] for one in figures)
