"""Riemannian preconditioning: the rate does not depend on how a change is shared out between A and B."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear
from lora_kernels.optim import riemannian

CLAIM = (
    "a change of rank 3 near the start, 60 steps of SGD: what is left grows with its condition number, 1,"
    " 10, 100, to over a hundredth; preconditioned it is below 1e-4 at each of them"
)
WIDTH, R, STEPS = 24, 3, 60


def run(seed: int) -> dict[str, float]:
    """The part of the distance from the start that is left, by optimiser and condition number."""
    figures = {}
    for condition in (1, 10, 100):
        for name in ("SGD", "Riemannian"):
            figures[f"{name}, {condition}"] = _left(seed, float(condition), name == "Riemannian")
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["SGD, 1"] < one["SGD, 10"] < one["SGD, 100"] > 0.01
        and max(one[f"Riemannian, {condition}"] for condition in (1, 10, 100)) < 1e-4
        for one in figures
    )


def _left(seed: int, condition: float, preconditioned: bool) -> float:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, R, generator=generator))[0] for _ in range(2))
    sizes = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), R)
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R)
    adapter = layer.adapters["default"]
    with torch.no_grad():  # near: a start at zero is where both only begin
        noise = 0.05 * sizes[-1]
        adapter.lora_B.copy_(u * sizes.sqrt() + noise * torch.randn(WIDTH, R, generator=generator))
        adapter.lora_A.copy_(sizes.sqrt()[:, None] * v.T + noise * torch.randn(R, WIDTH, generator=generator))
    change = u * sizes @ v.T
    first = float((adapter.delta().detach() - change).norm())
    sgd, lr = torch.optim.SGD, 0.5
    optimizer = riemannian(layer, sgd, lr=lr, reg=1e-6) if preconditioned else sgd(adapter.parameters(), lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (0.5 * (adapter.delta() - change).square().sum()).backward()
        optimizer.step()
    return float((adapter.delta().detach() - change).norm()) / first
