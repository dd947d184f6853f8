"""MoRA: a change of full rank, half the identity, at LoRA's number of parameters."""

from __future__ import annotations

import torch

from lora_kernels.adapters import LoRAConfig, make

from ._fit import fit

CLAIM = "of ΔW = I/2 (64 by 64), r = 4: type 1 leaves less than LoRA does, type 6 less than a tenth"
WIDTH, RANK, STEPS = 64, 4, 400


def run(seed: int) -> dict[str, float]:
    """The part of the squared change that is left."""
    torch.manual_seed(seed)
    want = torch.eye(WIDTH) / 2
    configs = {
        "LoRA": LoRAConfig(r=RANK, lora_alpha=RANK),
        "type 1": LoRAConfig(r=RANK, method="mora", method_options={"type": 1}),
        "type 6": LoRAConfig(r=RANK, method="mora"),
    }
    found = {}
    for name, config in configs.items():
        adapter = make(WIDTH, WIDTH, config)
        found[name] = fit(
            lambda a=adapter: (a.delta() - want).square().sum(), adapter.parameters(), STEPS, 1e-2
        )
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """LoRA of rank 4 cannot leave less than 60/64."""
    return all(one["type 6"] < 0.1 < one["type 1"] < one["LoRA"] for one in figures)
