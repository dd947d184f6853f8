"""y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ on Triton: the planner's choice of strategy, run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import planner
from .._arguments import LoraBackward, LoraInputs, flat
from ..planner import Plan, Problem

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@flat(LoraInputs)
def lora_linear(inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of ``_ops.py``: y, h and the packed keep bits."""
    plan = planner.plan(_problem("lora_linear", inputs.x, inputs, inputs.seed is not None))
    return _strategy(plan, "forward")(plan, inputs)


@flat(LoraBackward)
def lora_linear_backward(saved: LoraBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    plan = planner.plan(_problem("lora_linear_backward", saved.dy, saved, saved.mask is not None))
    return _strategy(plan, "backward")(plan, saved)


def _strategy(plan: Plan, direction: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f".{plan.strategy}", __package__), direction)


def _problem(op: str, rows: Tensor, given: LoraInputs | LoraBackward, dropout: bool) -> Problem:
    rank, cols = given.lora_a.shape
    sizes, base = (rows.shape[0], cols, given.lora_b.shape[0], rank), given.weight is not None
    return Problem(op, *sizes, _DTYPES[rows.dtype], planner.card(rows.device), dropout, base)
