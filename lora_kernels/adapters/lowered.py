"""The plain A, B and s that an adapter comes down to: what servers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Adapter
from .call import current_call
from .update import LowRank


@torch.no_grad()
def low_rank_of(adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """A ``[r, in]``, B ``[out, r]`` and s of ΔW = s · B A, computed once from the adapter's tensors.

    A gate, and a scale that is a tensor, go into B; what a method makes of x before A, into A.

    Raises:
        ValueError: the method's ΔW is not of that kind, or it has no one ΔW; the message names it.
    """
    eye = None if adapter.plain else adapter._identity(None)
    update: Any = adapter.lower(eye, current_call()) if adapter.plain or adapter.mergeable else None
    if not isinstance(update, LowRank) or update.magnitude is not None or not _of_one_kind(update):
        raise ValueError(f"method: {adapter.method} has no A, B and s that do not depend on the call")
    lora_a, lora_b, scaling, gate, x_lora, _ = update
    if not update.plain:
        h = x_lora if lora_a is None else (eye if x_lora is None else x_lora) @ lora_a.T
        lora_a = (h if gate is None else h * gate).T
    elif gate is not None:
        lora_b = lora_b * gate
    if isinstance(scaling, Tensor):
        lora_b, scaling = lora_b * scaling, 1.0
    return lora_a.detach(), lora_b.detach(), float(scaling)


def _of_one_kind(update: LowRank) -> bool:
    """Whether neither factor is one for each sample, and the gate none for each row of another x."""
    matrices = update.lora_b.dim() == 2 and (update.lora_a is None or update.lora_a.dim() == 2)
    gate = update.gate is None or update.gate.dim() == 1 or not update.plain
    return matrices and gate and (update.plain or update.x_lora is not None or update.lora_a is not None)
