"""All adapters of the demo served in one mixed batch, each row checked against its adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrations.pool import load_into_pool
from ..serving.modules import apply_multi_lora, pool_linears, use_adapters
from ..serving.pool import BASE, AdapterPool
from .data import Task
from .model import Batch, batches, load_encoder, pooled
from .train import EXCLUDED, RANK, TARGETS, Outcome

_ROWS = 8


@dataclass
class Served:
    """What the rows of one adapter came to: the largest differences of their features."""

    adapter: str
    rows: int
    difference: float
    """From the adapter alone in PEFT, or for the base from the encoder without adapters."""
    from_base: float
    """From the encoder without adapters: how far off a row would be that missed its adapter."""


@torch.no_grad()
def serve_mixed(
    outcomes: list[Outcome], tasks: list[Task], path: str, tokenizer: Any, tick: Callable[[], object]
) -> list[Served]:
    """Rows of every adapter, read back from its checkpoint, and of the base, in one batch and in turn."""
    from peft import PeftModel

    names, batch = _mixed_batch(tasks, tokenizer)
    model = _served(outcomes, path)
    with use_adapters(model, names):
        mixed = pooled(model, batch)
    alone = {BASE: pooled(load_encoder(path), batch)}
    tick()
    for o in outcomes:
        alone[o.task] = pooled(PeftModel.from_pretrained(load_encoder(path), o.path).eval(), batch)
        tick()
    return [_compare(name, names, mixed, alone) for name in alone]


def _mixed_batch(tasks: list[Task], tokenizer: Any) -> tuple[list[str], Batch]:
    """Held-out texts, and the adapter of each: neighbours differ."""
    names, pairs = [], []
    for i in range(_ROWS):
        for name, task in [*((task.name, task) for task in tasks), (BASE, tasks[i % len(tasks)])]:
            names.append(name)
            pairs.append(task.test[i % len(task.test)])
    return names, batches(tokenizer, pairs, len(pairs), sort=False)[0]


def _served(outcomes: list[Outcome], path: str) -> Any:
    """The encoder on a pool of the adapters in their checkpoints."""
    model = load_encoder(path)
    linears = pool_linears(model, TARGETS)
    linears = {name: sizes for name, sizes in linears.items() if name not in EXCLUDED}
    pool = AdapterPool(linears, pages=RANK * len(outcomes), slots=len(outcomes), max_rank=RANK)
    for o in outcomes:
        load_into_pool(pool, o.path, o.task)
    return apply_multi_lora(model, pool)


def _compare(name: str, names: list[str], mixed: Tensor, alone: dict[str, Tensor]) -> Served:
    rows = [i for i, other in enumerate(names) if other == name]
    own, base = ((mixed[rows] - alone[other][rows]).abs().max().item() for other in (name, BASE))
    return Served(name, len(rows), own, base)
