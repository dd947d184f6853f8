"""MiLoRA: the least singular directions of W train, so that what it does most stays."""

from __future__ import annotations

import torch

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes until its loss is below 0.5: the loss on what it knew is below"
    " PiSSA's"
)
LEADING, STEPS, LR = 8, 600, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss on the source, and ‖U_kᵀ ΔW V_k‖ over ‖U_kᵀ W V_k‖ of the second layer's W = U S Vᵀ."""
    tuning, figures = pretrained(seed), {}
    weight = tuning.net[2].weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    for name, start in (("LoRA", True), ("PiSSA", "pissa"), ("MiLoRA", "milora")):
        model = adapted(tuning, init_lora_weights=start)
        _, figures[f"{name}, source"] = losses(tuning, model, STEPS, LR, below=0.5)
        change = model[2].merged_weight() - weight
        among = u[:, :LEADING].T @ change @ vh[:LEADING].T
        figures[f"{name}, moved"] = float(among.norm() / s[:LEADING].norm())
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["MiLoRA, source"] < one["PiSSA, source"] for one in figures)
