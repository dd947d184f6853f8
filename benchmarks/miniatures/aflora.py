"""AFLoRA: far fewer numbers train on average, at about LoRA's loss."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters
from lora_kernels.schedules import AFLoRAFreezer

from ._change import fit, random_change

CLAIM = "on average less than half of LoRA's numbers train at the same r, and the loss is below twice LoRA's"
WIDTH, OUT, RANK, STEPS = 32, 48, 4, 400


def run(seed: int) -> dict[str, float]:
    """The average number that trains over LoRA's, and the losses."""
    x, change = random_change(seed, OUT, RANK)
    x, change = x[:, :WIDTH].contiguous(), change[:, :WIDTH] + 0.05 * torch.randn(OUT, WIDTH)
    lora = LoRALinear(WIDTH, OUT, bias=False, r=RANK, lora_alpha=RANK)
    ours = LoRALinear(WIDTH, OUT, bias=False, r=RANK, lora_alpha=RANK, method="aflora")
    ours.load_state_dict({**ours.state_dict(), "weight": lora.weight})
    want = x @ (lora.weight.detach() + change).T
    fitted = fit(lambda: (lora(x) - want).square().mean(), lora, STEPS)
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=3e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    freezer = AFLoRAFreezer(ours, total_steps=STEPS, t_i=STEPS // 20, t_f=STEPS * 7 // 10)
    counts = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (ours(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        rate.step()
        freezer.step()
        counts.append(count_parameters(ours)[0])
    average = sum(counts) / STEPS / count_parameters(lora)[0]
    return {"train": average, "LoRA, loss": fitted, "AFLoRA, loss": loss.item()}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["train"] < 0.5 and one["AFLoRA, loss"] < 2 * one["LoRA, loss"] for one in figures)
