"""LoRA learns less and forgets less than full training, and its change is of a low rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import apply_lora
from lora_kernels.analysis import biderman2024, effective_rank, learning_forgetting
from lora_kernels.nn import lora_layers

CLAIM = "over the seeds rank 1 learns less of a second task and forgets less of the first than full training"
WIDTH, ROWS, STEPS = 16, 128, 150


def run(seed: int) -> dict[str, float]:
    """What the second task's loss fell by, what the first's rose by, and the effective rank of the change."""
    generator = torch.Generator().manual_seed(seed)
    source, target = (_task(generator) for _ in range(2))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
    _train(model, source)
    figures = {}
    for name, rank in (("full", 0), ("rank 1", 1), ("rank 4", 4)):
        tuned = copy.deepcopy(model)
        if rank:
            apply_lora(tuned, biderman2024(rank))
        before = [_loss(tuned, *task).item() for task in (target, source)]
        _train(tuned, target)
        after = [_loss(tuned, *task).item() for task in (target, source)]
        learnt, forgotten = learning_forgetting((before[0], after[0]), (before[1], after[1]))
        figures |= {f"{name} learns": learnt, f"{name} forgets": forgotten}
        figures[f"rank of {name}"] = float(effective_rank(_change(model, tuned)))
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """Of the means; the ranks in all seeds."""

    def mean(name: str) -> float:
        return sum(one[name] for one in figures) / len(figures)

    less = all(mean(f"rank 1 {what}") < mean(f"full {what}") for what in ("learns", "forgets"))
    return less and all(one["rank of rank 1"] == 1 < one["rank of full"] for one in figures)


def _task(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x, torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=generator) / 2)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def _train(model: nn.Module, task: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(model, *task).backward()
        optimizer.step()


def _change(model: Any, tuned: Any) -> Tensor:
    """Of the first layer's W."""
    layers: dict[str, Any] = lora_layers(tuned)
    after = layers["0"].merged_weight() if layers else tuned[0].weight
    return (after - model[0].weight).detach()
