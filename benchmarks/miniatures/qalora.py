"""QA-LoRA: merged into an int4 base it computes what it did, and LoRA merged and quantised again does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.nn import LoRALinear, OffsetLinear

CLAIM = "its merge into int4 moves y by less than 1e-5 of its size; LoRA's, quantised again, by more than 1 %"
WIDTH, GROUP, R = 128, 32, 8


def run(seed: int) -> dict[str, float]:
    """How far merging moves the outputs, relative to their size."""
    linear, x = nn.Linear(WIDTH, WIDTH), torch.randn(64, WIDTH)
    config = LoRAConfig(r=R, method="qalora", method_options={"group_size": GROUP})
    ours = OffsetLinear.int4(linear, GROUP).adapt(config)
    lora = LoRALinear(WIDTH, WIDTH, r=R, init_lora_weights=False)
    lora.weight.data.copy_(OffsetLinear.int4(linear, GROUP).dense())
    with torch.no_grad():
        ours.adapter.lora_B.normal_(std=0.01)
        lora.adapters["default"].lora_B.mul_(0.1)
        moved = _moved(ours(x), ours.merge()(x))
        merged = nn.Linear(WIDTH, WIDTH)
        merged.weight.copy_(lora.merged_weight())
        want = F.linear(x, merged.weight)
        again = F.linear(x, OffsetLinear.int4(merged, GROUP).dense())
    return {"qalora": moved, "lora, quantised again": _moved(want, again)}


def holds(figures: list[dict[str, float]]) -> bool:
    """Rounding on the one side, codes of four bits on the other."""
    return all(one["qalora"] < 1e-5 and one["lora, quantised again"] > 0.01 for one in figures)


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())
