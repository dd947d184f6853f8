"""LaMDA: r² numbers in the end, and r numbers a row kept for them."""

from __future__ import annotations

import torch

from lora_kernels.nn import LoRALinear, count_parameters
from lora_kernels.schedules import LaMDAFreezer

from ._change import random_change, squared_error

CLAIM = (
    "with A frozen the branch keeps r numbers a row and not in; B is frozen after 30 % of the steps, and with"
    " the r² = 16 numbers that train on the loss comes within 5 % of training B throughout"
)
WIDTH, RANK, STEPS = 32, 4, 300


def run(seed: int) -> dict[str, float]:
    """What trains in the end, what is kept a row, and the loss over that with B trained throughout."""
    x, change = random_change(seed, WIDTH, RANK)
    losses = {}
    for eta in (1.0, 0.3):
        torch.manual_seed(seed)
        layer = LoRALinear(WIDTH, WIDTH, bias=False, r=RANK, lora_alpha=RANK, method="lamda")
        losses[eta] = _train(layer, x, change, eta)
    trained = float(count_parameters(layer)[0])
    return {"train on": trained, "kept a row": _kept(layer, x), "loss": losses[0.3] / losses[1.0]}


def holds(figures: list[dict[str, float]]) -> bool:
    """All three, in every seed."""
    return all(
        one["train on"] == RANK**2 and one["kept a row"] == RANK and one["loss"] < 1.05 for one in figures
    )


def _train(layer: LoRALinear, x: torch.Tensor, change: torch.Tensor, eta: float) -> float:
    want = x @ (layer.weight.detach() + change).T
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=3e-2)
    freezer = LaMDAFreezer(layer, max_steps=STEPS, eta=eta)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = squared_error(layer, x, want)
        loss.backward()
        optimizer.step()
        freezer.step()
    return loss.item()


def _kept(layer: LoRALinear, x: torch.Tensor) -> float:
    rows: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (rows.append(_per_row(t, x)), t)[1], lambda t: t
    )
    with hooks:
        layer(x)
    return float(sum(rows))


def _per_row(tensor: torch.Tensor, x: torch.Tensor) -> int:
    return tensor.shape[-1] if tensor.shape[0] == len(x) else 0
