"""Several tasks in one batch, each with inputs around a centre and a change of W of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.nn import LoRALinear

from ._fit import fit

WIDTH, RANK, TOKENS = 16, 2, 4


class Tasks(NamedTuple):
    """x ``[samples, tokens, width]``, each sample's task, and the outputs wanted."""

    linear: nn.Linear
    x: Tensor
    task: Tensor
    want: Tensor
    changes: Tensor


def tasks(seed: int, count: int, samples: int = 24) -> Tasks:
    """``samples`` of each of ``count`` tasks, shuffled; the changes are of rank 2."""
    torch.manual_seed(seed)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    centres = 2 * torch.linalg.qr(torch.randn(WIDTH, count))[0].T
    changes = torch.randn(count, WIDTH, RANK) @ torch.randn(count, RANK, WIDTH) / WIDTH**0.5
    task = torch.arange(count).repeat(samples)
    x = centres[task][:, None] + 0.5 * torch.randn(len(task), TOKENS, WIDTH)
    want = x @ linear.weight.detach().T + torch.einsum("noi,nti->nto", changes[task], x)
    return Tasks(linear, x, task, want, changes)


def copy_of(linear: nn.Linear) -> nn.Linear:
    """A linear with the same weight."""
    other = nn.Linear(WIDTH, WIDTH, bias=False)
    other.load_state_dict(linear.state_dict())
    return other


def lora(toy: Tasks, rank: int, only: int | None = None, steps: int = 250) -> tuple[LoRALinear, float]:
    """A LoRA that learnt all tasks, or one, and the part of its error that is left."""
    layer = LoRALinear.from_linear(copy_of(toy.linear), r=rank, lora_alpha=rank)
    part = slice(None) if only is None else toy.task == only
    x, want = toy.x[part], toy.want[part]
    return layer, fit(lambda: (layer(x) - want).square().mean(), layer.adapters.parameters(), steps, 2e-2)


def error(y: Tensor, toy: Tasks) -> float:
    """The mean squared error over that of the frozen linear."""
    base = (toy.x @ toy.linear.weight.T - toy.want).square().mean()
    return float((y - toy.want).square().mean().detach() / base.detach())
