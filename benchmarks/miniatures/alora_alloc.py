"""ALoRA: ranks move to the layer that needs them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import ALoRAAllocator

from ._toys import Beside, change_of_rank

CLAIM = (
    "of 8 ranks each for changes of rank 12, 4, 12 and 4, at least 20 of the 32 end where the changes are of"
    " rank 12, and at most 0.7 of the fixed ranks' loss is left"
)
WIDTH, STEPS, RANKS = 24, 400, {"one": 12, "two": 4, "three": 12, "four": 4}


def run(seed: int) -> dict[str, float]:
    """The ranks after training, and the loss to that at the start, with the allocator and without."""
    found = {}
    for name in ("fixed", "ALoRA"):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = Beside(WIDTH, tuple(RANKS))
        changes = [change_of_rank(WIDTH, rank, generator) for rank in RANKS.values()]
        x, checks = (torch.randn(64, WIDTH, generator=generator) for _ in range(2))
        want, wanted = model.after(x, changes), model.after(checks, changes)
        options = {"method": "alora_alloc", "method_options": {"active": 8}}
        apply_lora(model, LoRAConfig(r=16, lora_alpha=16, target_modules=[*RANKS], **options))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        check = partial(_loss, model, checks, wanted)
        schedule = ALoRAAllocator(model, check, optimizer, first=80, every=40, rounds=5, seed=seed)
        first = float(check().detach())
        for _ in range(STEPS):
            optimizer.zero_grad()
            _loss(model, x, want).backward()
            optimizer.step()
            if name == "ALoRA":
                schedule.step()
        found[f"{name}, loss"] = float(check().detach()) / first
        for rank in (12, 4):
            have = sum(got for one, got in schedule.ranks.items() if RANKS[one] == rank)
            found[f"{name}, ranks for those of rank {rank}"] = float(have)
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """In all seeds."""
    return all(
        one["ALoRA, ranks for those of rank 12"] >= 20 and one["ALoRA, loss"] <= 0.7 * one["fixed, loss"]
        for one in figures
    )


def _loss(model: Beside, x: Tensor, want: Tensor) -> Tensor:
    return (model(x) - want).square().mean()
