"""AdaLoRA: ranks go to the layer that needs them."""

from __future__ import annotations

import torch

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import AdaLoRA, adalora_penalty

from ._toys import Beside, change_of_rank

CLAIM = "of 8 ranks over two layers whose changes have 6 and 2 equal directions, at least 5 go to the first"
WIDTH, ROWS, BATCH, STEPS = 16, 256, 32, 400


def run(seed: int) -> dict[str, float]:
    """The ranks of both layers after training on noisy samples, and the loss to that at the start."""
    torch.manual_seed(seed)
    model, x = Beside(WIDTH, ("one", "two")), torch.randn(ROWS, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    want = model.after(x, [change_of_rank(WIDTH, k, generator) for k in (6, 2)])
    want = want + 0.3 * torch.randn_like(want)  # without noise what is learnt has no gradient, and no score
    apply_lora(model, LoRAConfig(r=8, lora_alpha=8, target_modules=["one", "two"], method="adalora"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = AdaLoRA(model, STEPS, target_r=4, tinit=100, tfinal=100)
    losses = []
    for _ in range(STEPS):
        rows = torch.randperm(ROWS)[:BATCH]
        optimizer.zero_grad()
        loss = (model(x[rows]) - want[:, rows]).square().mean()
        (loss + 0.1 * adalora_penalty(model)).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    ranks = {f"rank of {name}": float(kept.sum()) for name, kept in schedule.kept.items()}
    return {**ranks, "loss": losses[-1] / losses[0]}


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(one["rank of one"] >= 5 for one in figures)
