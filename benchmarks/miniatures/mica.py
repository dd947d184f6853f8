"""MiCA: A learns under the minor left singular vectors of W."""

from __future__ import annotations

import torch

from lora_kernels.nn import count_parameters

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes until its loss is below 0.5, with less than half of LoRA's"
    " numbers: along the 8 leading left singular vectors the second layer's W does not move, LoRA's does"
)
LEADING, STEPS = 8, 600


def run(seed: int) -> dict[str, float]:
    """‖U_kᵀ ΔW‖ over ‖U_kᵀ W‖, the numbers that train, and the losses."""
    tuning, figures = pretrained(seed), {}
    weight = tuning.net[2].weight.detach()
    u, s, _ = torch.linalg.svd(weight)
    for name, start, rate in (("LoRA", True, 1e-3), ("MiCA", "mica", 1e-2)):
        model = adapted(tuning, init_lora_weights=start)
        figures[f"{name}, numbers"] = float(count_parameters(model)[0])
        figures[f"{name}, loss"], _ = losses(tuning, model, STEPS, rate, below=0.5)
        change = model[2].merged_weight() - weight
        figures[f"{name}, moved"] = float((u[:, :LEADING].T @ change).norm() / s[:LEADING].norm())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """All of it, in every seed."""
    return all(
        one["MiCA, numbers"] < 0.5 * one["LoRA, numbers"]
        and one["MiCA, loss"] < 0.55
        and one["MiCA, moved"] < 1e-5 < 0.01 < one["LoRA, moved"]
        for one in figures
    )
