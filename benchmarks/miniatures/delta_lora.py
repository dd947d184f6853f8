"""Delta-LoRA: W follows the adapters, by what LoRA's optimiser holds and up to twice the rank."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import DeltaLoRA

from ._toys import change_of_rank, left, rank_of

CLAIM = "reaches rank 2r with the optimiser state of LoRA of r, and learns a change faster at the same rate"
WIDTH, R, STEPS, START = 32, 4, 60, 10


def run(seed: int) -> dict[str, float]:
    """What is left after few steps, the rank, and the numbers that the optimiser holds."""
    figures = {}
    for name, method in (("LoRA", "lora"), ("Delta-LoRA", "delta_lora")):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        figures.update({f"{name}, {key}": value for key, value in _train(method, generator).items()})
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Rank 2r, the same state, and less left."""
    return all(
        one["Delta-LoRA, rank"] == 2 * R
        and one["Delta-LoRA, state"] == one["LoRA, state"]
        and one["Delta-LoRA, left"] < one["LoRA, left"]
        for one in figures
    )


def _train(method: str, generator: torch.Generator) -> dict[str, float]:
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method=method)
    change = change_of_rank(WIDTH, R, generator)
    x = torch.randn(64, WIDTH, generator=generator)
    want = x @ (layer.weight.detach() + change).T
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-3)
    schedule = DeltaLoRA(layer, lam=2.0, start_step=START) if method == "delta_lora" else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - want).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    delta = layer.adapters["default"].delta().detach()
    state = sum(one["exp_avg"].numel() + one["exp_avg_sq"].numel() for one in optimizer.state.values())
    return {"left": left(delta, change), "rank": rank_of(delta, 1e-4), "state": state}
