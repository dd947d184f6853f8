"""LoRA-FA's optimiser: A frozen, and B's gradient projected."""

from __future__ import annotations

import torch

from lora_kernels.optim import LoRAFA

from ._pretrained import adapted, loss_of, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes with r = 16 and one rate: A stays as it is, and 100 steps"
    " leave less loss than AdamW's on B alone"
)
STEPS, LR, R = 100, 3e-3, 16


def run(seed: int) -> dict[str, float]:
    """The losses on the target, and by how much A moved."""
    tuning = pretrained(seed)
    torch.manual_seed(seed)
    plain = losses(tuning, adapted(tuning, R, method="lora_fa"), STEPS, LR)[0]
    torch.manual_seed(seed)
    model = adapted(tuning, R)
    lora_a = model[0].adapters["default"].lora_A
    start, optimizer = lora_a.detach().clone(), LoRAFA(model, lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, tuning.target)
        loss.backward()
        optimizer.step()
    return {"AdamW": plain, "LoRA-FA": loss.item(), "A moved": float((lora_a.detach() - start).norm())}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["LoRA-FA"] < one["AdamW"] and one["A moved"] == 0 for one in figures)
