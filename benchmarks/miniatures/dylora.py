"""DyLoRA: any rank below r serves."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import DyLoRASampler

CLAIM = (
    "cut to a rank of up to half of r = 8, it leaves less of a change of falling spectrum than LoRA cut so"
)
WIDTH, R, STEPS = 32, 8, 2000


def run(seed: int) -> dict[str, float]:
    """The relative squared error at b = 1, 2, 3, 4, of LoRA and of DyLoRA."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, R, generator=generator))[0] for _ in range(2))
    change = u * 0.7 ** torch.arange(R) @ v.T
    figures = {}
    for name, sampled in (("LoRA", False), ("DyLoRA", True)):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method="dylora")
        adapter = layer.adapters["default"]
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=5e-3)
        sampler = DyLoRASampler(layer, seed=seed) if sampled else None
        for _ in range(STEPS):
            optimizer.zero_grad()
            (adapter.delta() - change).square().sum().backward()
            optimizer.step()
            if sampler is not None:
                sampler.step()
        for b in range(1, R // 2 + 1):
            adapter.set_rank(b)
            left = (adapter.delta().detach() - change).square().sum() / change.square().sum()
            figures[f"{name}, b = {b}"] = float(left)
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """At each of these ranks, in every seed."""
    return all(
        one[f"DyLoRA, b = {b}"] < one[f"LoRA, b = {b}"] for one in figures for b in range(1, R // 2 + 1)
    )
