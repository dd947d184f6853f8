"""FourierFT: a change of few frequencies has full rank and few parameters."""

from __future__ import annotations

import torch

from lora_kernels.adapters import LoRAConfig, make

from ._fit import fit

CLAIM = "fits 60 frequencies (64 by 64) to 0.0001 with 60 numbers; the 128 of LoRA with r = 1 leave over 0.8"
WIDTH, COUNT, STEPS = 64, 60, 400


def run(seed: int) -> dict[str, float]:
    """The part of the squared change that is left."""
    torch.manual_seed(seed)
    options = {"n_frequency": COUNT, "scaling": float(WIDTH)}
    teacher, adapter = (
        make(WIDTH, WIDTH, LoRAConfig(method="fourierft", method_options=options, init_lora_weights=init))
        for init in (False, True)
    )
    want = teacher.delta().detach()
    lora = make(WIDTH, WIDTH, LoRAConfig(r=1, lora_alpha=1))
    return {
        "FourierFT": fit(lambda: (adapter.delta() - want).square().sum(), adapter.parameters(), STEPS, 5e-2),
        "LoRA": fit(lambda: (lora.delta() - want).square().sum(), lora.parameters(), STEPS, 5e-2),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Over all seeds."""
    return all(one["FourierFT"] < 1e-4 and one["LoRA"] > 0.8 for one in figures)
