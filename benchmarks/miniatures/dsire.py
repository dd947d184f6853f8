"""DSiRe: the size of a training set from the singular values of rank-4 adapters."""

from __future__ import annotations

import torch

from lora_kernels.analysis import DSiRe, lora_spectrum

CLAIM = "sizes 1, 4, 16, 64, 256 from 6 adapters each: more than twice chance; N = 1 is nearly of rank 1"
SIZES = (1, 4, 16, 64, 256)


def run(seed: int) -> dict[str, float]:
    """The share of sizes that are right, and the second singular value over the first for N = 1."""
    generator = torch.Generator().manual_seed(seed)
    known, asked = ([(size, _trained(size, generator)) for size in SIZES for _ in range(6)] for _ in range(2))
    dsire = DSiRe().fit([one for _, one in known], [size for size, _ in known])
    right = sum(dsire.predict(one) == size for size, one in asked)
    values = lora_spectrum(*known[0][1]["layer"])["BA"]
    return {"right": right / len(asked), "second": float(values[1] / values[0])}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["right"] > 2 / len(SIZES) and one["second"] < 0.1 for one in figures)


def _trained(samples, generator):
    x, y = (torch.randn(samples, 16, generator=generator) for _ in range(2))
    lora_a = (torch.randn(4, 16, generator=generator) / 4).requires_grad_()
    lora_b = torch.zeros(16, 4, requires_grad=True)
    optimizer = torch.optim.Adam([lora_a, lora_b], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (x @ lora_a.T @ lora_b.T - y).square().mean().backward()
        optimizer.step()
    return {"layer": (lora_a.detach(), lora_b.detach())}
