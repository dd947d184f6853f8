"""AdaLoRA: ranks go to the layer that needs them."""

from __future__ import annotations

import torch

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import AdaLoRA, adalora_penalty

from ._toys import Beside

CLAIM = "of 8 ranks over two layers whose changes have rank 6 and 2, at least 5 go to the first"
WIDTH, STEPS = 16, 400


def run(seed: int) -> dict[str, float]:
    """The ranks of both layers after training, and the loss to that at the start."""
    torch.manual_seed(seed)
    model = Beside(WIDTH, ("one", "two"))
    x = torch.randn(64, WIDTH)
    changes = [torch.randn(WIDTH, k) @ torch.randn(k, WIDTH) / k**0.5 for k in (6, 2)]
    want = model.after(x, changes)
    apply_lora(model, LoRAConfig(r=8, lora_alpha=8, target_modules=["one", "two"], method="adalora"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    schedule = AdaLoRA(model, STEPS, target_r=4, tinit=100, tfinal=100)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - want).square().mean()
        (loss + 0.1 * adalora_penalty(model)).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    ranks = {f"rank of {name}": float(kept.sum()) for name, kept in schedule.kept.items()}
    return {**ranks, "loss": losses[-1] / losses[0]}


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(one["rank of one"] >= 5 for one in figures)
