"""MTLoRA: a branch for each task beside a shared one, over one product with W."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.nn import LoRALinear, MultiTaskLinear

from ._change import fit, random_change

CLAIM = "four tasks with changes of their own are learnt to a tenth of the error of one shared LoRA"
WIDTH, RANK, TASKS, STEPS = 24, 2, ("a", "b", "c", "d"), 300


def run(seed: int) -> dict[str, float]:
    """The mean squared error over the tasks."""
    x, _ = random_change(seed, WIDTH, RANK)
    changes = [random_change(10 * seed + i, WIDTH, RANK)[1] for i in range(len(TASKS))]
    torch.manual_seed(seed)
    many = MultiTaskLinear(WIDTH, WIDTH, TASKS, r=RANK, r_task=RANK, scale=1.0, lora_dropout=0.0, bias=False)
    one = LoRALinear(WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK)

    def wanted(weight: Tensor) -> list[Tensor]:
        return [x @ (weight.detach() + change).T for change in changes]

    def of_many() -> Tensor:
        ys = many(x)[1]
        return _error([ys[name] for name in TASKS], wanted(many.weight))

    shared = fit(lambda: _error([one(x)] * len(TASKS), wanted(one.weight)), one, STEPS)
    return {"one LoRA": shared, "MTLoRA": fit(of_many, many, STEPS)}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["MTLoRA"] < 0.1 * one["one LoRA"] for one in figures)


def _error(ys: list[Tensor], wants: list[Tensor]) -> Tensor:
    return torch.stack([(y - want).square().mean() for y, want in zip(ys, wants, strict=True)]).mean()
