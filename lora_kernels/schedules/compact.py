"""Smaller factors with the same output, once ranks have become zero."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapter_layer import AdapterLayer
from ..nn.apply import lora_configs
from ..nn.pairs import Pair
from ..optim._common import pairs_of
from ._common import check_unmerged

# Method -> its tensors of a rank's length, and which dimension that is.
_TENSORS = {
    "lora": {"lora_A": 0, "lora_B": 1},
    "sora": {"lora_A": 0, "lora_B": 1, "gate": 0},
    "adalora": {"lora_A": 0, "lora_B": 1, "lora_E": 0},
}


@torch.no_grad()
def compact(model: nn.Module) -> dict[str, int]:
    """A ← A[alive], B ← B[:, alive] for the ranks that contribute; s as it was, the output the same

    A rank is dead where its row of A, its column of B or its gate is zero; one stays where all are. For
    adapters of ``lora``, ``sora`` and ``adalora``, and of PEFT's LoRA. The parameters stay the same objects,
    of other shapes: call it once training is done, optimisers know the old ones. Configs get the new ranks,
    so that the adapter can be saved.

    Returns:
        Name of each layer -> its rank.

    Raises:
        TypeError: not a module.
        ValueError: there are no adapters, a method cannot be made smaller, a layer is merged or is no matrix;
            nothing is changed.
    """
    pairs = pairs_of(model)
    check_unmerged(pairs)
    alive = [_alive(pair) for pair in pairs]
    for pair, kept in zip(pairs, alive, strict=True):
        _shrink(model, pair, kept)
    return {pair.name: pair.rank for pair in pairs}


def _alive(pair: Pair) -> Tensor:
    """The places of the ranks that contribute."""
    if pair.lora_a.dim() != 2:
        raise ValueError(f"model: {pair.name}: expected a matrix, got the factors of a convolution")
    living = pair.lora_a.any(1) & pair.lora_b.any(0)
    if isinstance(pair.layer, AdapterLayer):
        adapter: Any = pair.layer.adapters[pair.adapter]
        if adapter.method not in _TENSORS:
            want = ", ".join(_TENSORS)
            raise ValueError(f"model: {pair.name}: expected one of {want}, got {adapter.method}")
        for name in set(_TENSORS[adapter.method]) - {"lora_A", "lora_B"}:
            living &= getattr(adapter, name).flatten().bool()
    elif not pair.plain:
        raise ValueError(f"model: {pair.name}: expected plain LoRA, got a variant")
    kept = living.nonzero().flatten()
    return kept if kept.numel() else kept.new_zeros(1)


def _shrink(model: nn.Module, pair: Pair, kept: Tensor) -> None:
    rank, layer = len(kept), pair.layer
    if isinstance(layer, AdapterLayer):
        adapter: Any = layer.adapters[pair.adapter]
        for name, dim in _TENSORS[adapter.method].items():
            _take(getattr(adapter, name), kept, dim)
        if adapter.method != "adalora":  # whose scale keeps the first r
            adapter.lora_alpha = pair.scaling * (math.sqrt(rank) if adapter.use_rslora else rank)
        adapter.r = rank
        adapter.config = dataclasses.replace(adapter.config, r=rank, lora_alpha=adapter.lora_alpha)
        configs: Any = lora_configs(model)
        alpha, config = adapter.lora_alpha, configs.get(pair.adapter)
        if config is not None:
            _note(config, pair.name, rank, alpha)
        return
    _take(pair.lora_a, kept, 0)
    _take(pair.lora_b, kept, 1)
    _shrink_peft(model, pair, rank)


def _shrink_peft(model: Any, pair: Pair, rank: int) -> None:
    layer: Any = pair.layer
    layer.r[pair.adapter] = rank
    if pair.adapter in layer.lora_A:
        layer.lora_A[pair.adapter].out_features = layer.lora_B[pair.adapter].in_features = rank
    config = model.peft_config[pair.adapter]
    alpha = pair.scaling * (math.sqrt(rank) if config.use_rslora else rank)
    layer.lora_alpha[pair.adapter] = alpha
    _note(config, pair.name.removeprefix("base_model.model."), rank, alpha)


def _take(parameter: nn.Parameter, kept: Tensor, dim: int) -> None:
    parameter.grad = None
    parameter.data = parameter.data.index_select(dim, kept)


def _note(config: Any, name: str, rank: int, alpha: float) -> None:
    """The layer's rank and alpha before any other pattern, of which the first that matches counts."""
    key = re.escape(name)
    config.rank_pattern = {key: rank, **{k: v for k, v in config.rank_pattern.items() if k != key}}
    config.alpha_pattern = {key: alpha, **{k: v for k, v in config.alpha_pattern.items() if k != key}}
