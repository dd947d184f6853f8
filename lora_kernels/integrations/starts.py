"""Adapters on disk whose start was taken out of W: LoRA of twice the rank on W itself, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters import LoRAConfig
from ..init import GIVEN

# The fields of a config that change with the rank.
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
Starts = dict[str, dict[str, Tensor]]  # PEFT's name of a layer -> its start_A and start_B


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A' = [A; A₀] and B' = [B, -B₀] of each layer: s · B'A' = s · (B A - B₀ A₀) is the change of W."""
    plain = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in GIVEN:
            continue
        factor = _FACTOR.fullmatch(name)
        start = tensors.get(f"{factor[1]}.start_{factor[2]}") if factor else None
        if factor and start is not None:
            is_a = factor[2] == "A"
            tensor = torch.cat((tensor, start if is_a else -start), 0 if is_a else 1)
        plain[name] = tensor
    return plain


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Starts]:
    """Undoes :func:`doubled`."""
    halves: dict[str, Tensor] = {}
    starts: Starts = {}
    for name, tensor in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if not factor:
            halves[name] = tensor
            continue
        is_a = factor[2] == "A"
        halves[name], start = tensor.chunk(2, 0 if is_a else 1)
        flat = start.flatten(1)
        starts.setdefault(factor[1], {})[f"start_{factor[2]}"] = flat if is_a else -flat
    return halves, starts


def doubled_fields(config: LoRAConfig) -> dict[str, Any]:
    """The fields of the config of twice the rank, whose s is the same."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    }


def own_fields(config: LoRAConfig) -> dict[str, Any]:
    """The fields to keep beside them, from which the adapter goes on as it was."""
    names = (*_FIELDS, "init_lora_weights", "method_options")
    return {name: getattr(config, name) for name in names}
