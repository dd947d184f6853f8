"""VB-LoRA: what is stored is a bank, a few indices and weights."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora

from ._planted import left

CLAIM = "four layers learn a change to less than half of it and store a third of what LoRA of their rank does"
WIDTH, LAYERS, R, COUNT, LENGTH, TOPK = 48, 4, 4, 24, 12, 2


def run(seed: int) -> dict[str, float]:
    """What is left, and the stored numbers: float32 words, with an index of a byte."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    x = torch.randn(128, WIDTH, generator=generator)
    change = torch.randn(WIDTH, R, generator=generator) @ torch.randn(R, WIDTH, generator=generator)
    want = model(x).detach() + 0.02 * x @ change.T
    options = {"num_vectors": COUNT, "vector_length": LENGTH, "topk": TOPK}
    config = LoRAConfig(r=R, method="vblora", target_modules="all-linear", method_options=options)
    apply_lora(model, config)
    pieces = LAYERS * R * 2 * WIDTH // LENGTH
    stored = COUNT * LENGTH + pieces * (TOPK - 1) + pieces * TOPK / 4
    return {
        "left": left(model, x, want, 150, 4e-2),
        "stored": stored,
        "stored, lora": float(LAYERS * R * 2 * WIDTH),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """For each seed."""
    return all(one["left"] < 0.5 and one["stored"] < one["stored, lora"] / 3 for one in figures)
