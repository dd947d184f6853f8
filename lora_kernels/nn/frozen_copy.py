"""The model as it is now, for a loss that compares with it later: only what trains is copied."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .adapted import lora_layers


def frozen_copy(model: nn.Module) -> Any:
    """y' = y of this moment, whatever ``model`` learns from now on

    The copy shares the frozen parameters of ``model``, and its quantised weights, and has its own of all that
    trains. So a reference beside a policy (``ref_model`` of TRL's ``DPOTrainer``) costs an adapter and no
    second base. A schedule that moves W (ReLoRA) moves it for both.

    Args:
        model: any module; one of :func:`apply_lora`, as a rule.

    Returns:
        The copy, in evaluation mode; nothing of it trains.

    Raises:
        TypeError: ``model`` is not a module.

    >>> policy = apply_lora(nn.Sequential(nn.Linear(8, 4)), LoRAConfig(target_modules=["0"]))
    >>> reference = frozen_copy(policy)
    >>> reference[0].weight is policy[0].weight
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    shared: list[torch.Tensor] = [p for p in model.parameters() if not p.requires_grad]
    for layer in lora_layers(model).values():
        shared += layer.buffers(recurse=False)
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    return made.requires_grad_(False).eval()
