"""GaLore: W trains through gradients of rank r, and ends beyond rank r."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.optim import GaLoreAdamW

from ._change import fit

CLAIM = (
    "a change of full rank (48 by 48), r = 4, new vectors every 20 steps: it leaves less than half of"
    " what the best matrix of rank 4 leaves, LoRA more than that one, with half of LoRA's optimiser state"
)
WIDTH, R, STEPS = 48, 4, 600


def run(seed: int) -> dict[str, float]:
    """The part of the change that is left, and the numbers that the optimiser holds."""
    torch.manual_seed(seed)
    change = torch.randn(WIDTH, WIDTH) / WIDTH
    x = torch.linalg.qr(torch.randn(4 * WIDTH, WIDTH))[0] * (4 * WIDTH) ** 0.5
    best = torch.linalg.svdvals(change)[R:].norm() / change.norm()
    lora, galore = (LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R) for _ in range(2))
    first, want = lora.weight.detach().clone(), x @ (lora.weight.detach() + change).T
    fit(lambda: (lora(x) - want).square().mean(), lora, STEPS, 1e-2)
    start, want = galore.weight.detach().clone(), x @ (galore.weight.detach() + change).T
    optimizer = GaLoreAdamW(galore, lr=3e-3, update_proj_gap=20, scale=1.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (galore(x) - want).square().mean().backward()
        optimizer.step()
        rate.step()
    held = sum(
        t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()
    )
    return {
        "best of rank 4": float(best),
        "LoRA": float((lora.merged_weight() - first - change).norm() / change.norm()),
        "GaLore": float((galore.weight.detach() - start - change).norm() / change.norm()),
        "LoRA, state": float(4 * R * WIDTH),
        "GaLore, state": float(held),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """All of it, in every seed."""
    return all(
        one["GaLore"] < 0.5 * one["best of rank 4"]
        and one["LoRA"] > 0.999 * one["best of rank 4"]
        and one["GaLore, state"] <= 0.5 * one["LoRA, state"]
        for one in figures
    )
