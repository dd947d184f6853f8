"""QuanTA: a full-rank change that gates on pairs of axes make."""

from __future__ import annotations

import torch

from lora_kernels.adapters import LoRAConfig, make

from ._fit import fit

CLAIM = (
    "fits a full-rank change that gates make (64 by 64) to 1 %; LoRA of as many numbers leaves 0.4 or more"
)
WIDTH, DIMS, RANK, STEPS = 64, (4, 4, 4), 6, 400


def run(seed: int) -> dict[str, float]:
    """The part of the squared change that is left; both have 768 parameters."""
    torch.manual_seed(seed)
    adapter = make(WIDTH, WIDTH, LoRAConfig(method="quanta", method_options={"dims": DIMS}))
    start = adapter.delta().detach()
    kept = [p.detach().clone() for p in adapter.parameters()]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        want = adapter.delta() - start
        for parameter, before in zip(adapter.parameters(), kept, strict=True):
            parameter.copy_(before)
    lora = make(WIDTH, WIDTH, LoRAConfig(r=RANK, lora_alpha=RANK))
    return {
        "QuanTA": fit(
            lambda: (adapter.delta() - start - want).square().sum(), adapter.parameters(), STEPS, 1e-2
        ),
        "LoRA": fit(lambda: (lora.delta() - want).square().sum(), lora.parameters(), STEPS, 1e-2),
        "rank": float(torch.linalg.matrix_rank(want)),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Over all seeds."""
    return all(one["QuanTA"] < 0.01 and one["LoRA"] > 0.4 and one["rank"] == WIDTH for one in figures)
