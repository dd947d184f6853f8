"""AutoLoRA: gates find that a change has one rank."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lora_kernels.nn import LoRALinear
from lora_kernels.schedules import AutoLoRA

CLAIM = "of the 8 ranks searched at most 3 stay for a change of rank 1 that is seen through noise"
WIDTH, R, STEPS = 24, 8, 200


def run(seed: int) -> dict[str, float]:
    """How many ranks stay by each rule."""
    torch.manual_seed(seed)
    options = {"method": "bilora", "method_options": {"values": "softmax"}}
    layer = LoRALinear(WIDTH, WIDTH, bias=False, r=R, lora_alpha=R * R, **options)
    change = torch.randn(WIDTH, 1) @ torch.randn(1, WIDTH) / WIDTH
    x = torch.randn(96, WIDTH)
    want = x @ (layer.weight.detach() + change).T
    want = want + 0.2 * torch.randn_like(
        want
    )  # as large as the change: more ranks fit it, and generalise less

    def loss(rows: Tensor) -> Tensor:
        return (layer(x[rows]) - want[rows]).square().mean()

    halves = torch.arange(96).chunk(2)
    search = AutoLoRA(layer, loss, *map(itertools.repeat, halves), unroll=1e-2, lr=3e-2)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(halves[0]).backward()
        optimizer.step()
        search.step()
    return {rule: float(search.ranks(rule)[""]) for rule in ("softmax", "raw")}


def holds(figures: list[dict[str, float]]) -> bool:
    """By the paper's rule."""
    return all(one["softmax"] <= 3 for one in figures)
