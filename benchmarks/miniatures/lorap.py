"""LoRAP: a decomposition weighted by what a layer reads keeps more of what it writes."""

from __future__ import annotations

import torch

from lora_kernels.compress import awsvd, truncate_svd

CLAIM = (
    "at ranks 4, 8 and 16 of 48 the weighted decomposition loses at most 0.9 of the outputs that the plain"
    " one loses, on samples that it has not seen"
)
WIDTH, RANKS = 48, (4, 8, 16)


def run(seed: int) -> dict[str, float]:
    """The part of the outputs that each loses, by rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    scale = torch.randn(WIDTH, generator=generator).exp()
    seen, new = (scale * torch.randn(400, WIDTH, generator=generator) for _ in range(2))
    want, found = new @ weight.T, {}
    for rank in RANKS:
        for name, (a, b) in (
            ("plain", truncate_svd(weight, rank)),
            ("weighted", awsvd(weight, seen.square().sum(0), rank)),
        ):
            found[f"{name}, rank {rank}"] = float((want - new @ a.T @ b.T).norm() / want.norm())
    return found


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed and at every rank."""
    return all(
        one[f"weighted, rank {rank}"] <= 0.9 * one[f"plain, rank {rank}"] for one in figures for rank in RANKS
    )
