"""y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ on Triton: the planner's choice of strategy, run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import planner
from ..planner import Plan, Problem

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    x_lora: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    plan = planner.plan(_problem("lora_linear", x, lora_a, lora_b, weight, seed is not None))
    run = _strategy(plan, "forward")
    return run(plan, x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    separate: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    plan = planner.plan(_problem("lora_linear_backward", dy, lora_a, lora_b, weight, mask is not None))
    run = _strategy(plan, "backward")
    rest = (h, gate, mask, scaling, dropout_p, separate, needs)
    return run(plan, dy, x, weight, lora_a, lora_b, *rest)


def _strategy(plan: Plan, direction: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f".{plan.strategy}", __package__), direction)


def _problem(
    op: str, rows: Tensor, lora_a: Tensor, lora_b: Tensor, weight: Tensor | None, dropout: bool
) -> Problem:
    rank, cols = lora_a.shape
    sizes = (rows.shape[0], cols, lora_b.shape[0], rank)
    return Problem(op, *sizes, _DTYPES[rows.dtype], planner.card(rows.device), dropout, weight is not None)
