"""LoNAS: one adapter trained on slices of itself serves each of them."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear

CLAIM = "trained on random ranks, half the ranks leave less than 0.9 of what half of plainly trained ones do"
WIDTH, R, STEPS = 24, 8, 200


def run(seed: int) -> dict[str, float]:
    """What is left of a change whose directions differ in size, at the whole rank and at half of it."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, R, generator=generator)).Q for _ in range(2))
    change = u * torch.linspace(2.0, 0.2, R) @ v.T
    x, found = torch.randn(96, WIDTH, generator=generator), {}
    for name in ("plain", "elastic"):
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R, method="lonas")
        want, adapter = x @ (layer.weight.detach() + change).T, layer.adapters["default"]
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(STEPS):
            if name == "elastic":
                adapter.set_rank(adapter.ranks[int(torch.randint(2, (), generator=generator))])
            optimizer.zero_grad()
            (layer(x) - want).square().mean().backward()
            optimizer.step()
        for rank in (R, R // 2):
            adapter.set_rank(rank)
            part = (adapter.delta().detach() - change).norm() / change.norm()
            found[f"{name}, {rank} ranks"] = float(part)
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """For each seed."""
    half = f"{R // 2} ranks"
    return all(one[f"elastic, {half}"] < 0.9 * one[f"plain, {half}"] for one in figures)
