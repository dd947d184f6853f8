"""Smaller factors with the same output, once ranks have become zero."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.adapted import lora_configs
from ..nn.adapter_layer import AdapterLayer
from ..nn.outdated import note_cut
from ..nn.pairs import Pair
from ..optim._common import pairs_of
from ._common import check_unmerged

_FACTORS = {"lora_A": 0, "lora_B": 1}
# Method -> its tensors of a rank's length, and which dimension that is.
_TENSORS = {
    "lora": _FACTORS,
    "advlora": _FACTORS,
    "dylora": _FACTORS,
    "lonas": _FACTORS,
    "sora": {**_FACTORS, "gate": 0},
    "adalora": {**_FACTORS, "lora_E": 0},
    "alora_alloc": {**_FACTORS, "alive": 0},
    "blora": {**_FACTORS, "lora_E": 0, "rank_gates": 0},
}


@torch.no_grad()
def compact(model: nn.Module, *, optimizer: Optimizer | None = None) -> dict[str, int]:
    """A ← A[alive], B ← B[:, alive] for the ranks that contribute; s as it was, the output the same

    A rank is dead where its row of A, its column of B or its gate is zero, and where an elastic method does
    not use it at this moment; one stays where all are. For adapters of ``lora``, ``advlora``, ``sora``,
    ``adalora``, ``alora_alloc``, ``blora``, ``dylora`` and ``lonas``, and of PEFT's LoRA. The parameters
    stay the same objects, of other shapes. Configs get the new ranks, so that the adapter can be saved.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        optimizer: one that goes on training it: its moments are cut as the parameters are, and what it has
            in other shapes (factored moments) is forgotten. Any other that knows the old shapes refuses its
            next step.

    Returns:
        Name of each layer -> its rank.

    Raises:
        TypeError: not a module, or no optimiser.
        ValueError: there are no adapters, a method cannot be made smaller, a layer is merged or is no matrix;
            nothing is changed.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> compact(model)
        {'0': 1}
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected a torch optimiser, got {type(optimizer).__name__}")
    pairs = pairs_of(model)
    check_unmerged(pairs)
    alive = [_alive(pair) for pair in pairs]
    for pair, kept in zip(pairs, alive, strict=True):
        for parameter, dim in _tensors(pair):
            _take(pair.name, parameter, kept, dim, optimizer)
        _note_rank(model, pair, len(kept))
    return {pair.name: pair.rank for pair in pairs}


def _alive(pair: Pair) -> Tensor:
    """The places of the ranks that contribute."""
    if pair.lora_a.dim() != 2:
        raise ValueError(f"model: {pair.name}: expected a matrix, got the factors of a convolution")
    if isinstance(pair.layer, AdapterLayer):
        living = _in_use(pair, pair.layer.adapters[pair.adapter])
    elif not pair.plain:
        raise ValueError(f"model: {pair.name}: expected plain LoRA, got a variant")
    else:
        living = pair.lora_a.any(1) & pair.lora_b.any(0)
    kept = living.nonzero().flatten()
    return kept if kept.numel() else kept.new_zeros(1)


def _in_use(pair: Pair, adapter: Any) -> Tensor:
    """Which ranks of one of our adapters contribute, as it is evaluated."""
    if adapter.method not in _TENSORS:
        raise ValueError(f"model: {pair.name}: expected one of {', '.join(_TENSORS)}, got {adapter.method}")
    training, adapter.training = adapter.training, False
    update = adapter.lower()
    adapter.training = training
    used = update.lora_a.any(1) & update.lora_b.any(0)
    used = used if update.gate is None else used & update.gate.bool()
    return torch.nn.functional.pad(used, (0, pair.rank - len(used)))


def _tensors(pair: Pair) -> list[tuple[Any, int]]:
    """The tensors of a rank's length, and along which dimension."""
    if not isinstance(pair.layer, AdapterLayer):
        return [(pair.lora_a, 0), (pair.lora_b, 1)]
    adapter = pair.layer.adapters[pair.adapter]
    return [(getattr(adapter, name), dim) for name, dim in _TENSORS[adapter.method].items()]


def _note_rank(model: nn.Module, pair: Pair, rank: int) -> None:
    """Writes the new rank wherever one stands."""
    layer = pair.layer
    if isinstance(layer, AdapterLayer):
        adapter: Any = layer.adapters[pair.adapter]
        if adapter.method != "adalora":  # whose scale keeps the first r
            adapter.lora_alpha = pair.scaling * (math.sqrt(rank) if adapter.use_rslora else rank)
        adapter.r = rank
        adapter.config = dataclasses.replace(adapter.config, r=rank, lora_alpha=adapter.lora_alpha)
        configs: Any = lora_configs(model)
        alpha, config = adapter.lora_alpha, configs.get(pair.adapter)
        if config is not None:
            _note(config, pair.name, rank, alpha)
        if hasattr(adapter, "set_rank"):
            _settle(adapter, config)
        return
    _shrink_peft(model, pair, rank)


def _settle(adapter: Any, *configs: Any) -> None:
    """An elastic adapter uses the ranks that are left, and no choice of more is on record."""
    adapter.set_rank(adapter.r)
    for config in (adapter.config, *(one for one in configs if one is not None)):
        config.method_options = {k: v for k, v in config.method_options.items() if k != "ranks"}
    if hasattr(adapter, "ranks"):
        adapter.ranks = tuple(rank for rank in adapter.ranks if rank <= adapter.r)


def _shrink_peft(model: Any, pair: Pair, rank: int) -> None:
    layer: Any = pair.layer
    layer.r[pair.adapter] = rank
    if pair.adapter in layer.lora_A:
        layer.lora_A[pair.adapter].out_features = layer.lora_B[pair.adapter].in_features = rank
    config = model.peft_config[pair.adapter]
    alpha = pair.scaling * (math.sqrt(rank) if config.use_rslora else rank)
    layer.lora_alpha[pair.adapter] = alpha
    _note(config, pair.name.removeprefix("base_model.model."), rank, alpha)


def _take(what: str, parameter: Any, kept: Tensor, dim: int, optimizer: Optimizer | None) -> None:
    before = parameter.shape
    parameter.grad = None
    parameter.data = parameter.data.index_select(dim, kept)
    if optimizer is not None:
        _take_moments(optimizer.state, parameter, before, kept, dim)
    if parameter.shape != before:
        note_cut(what, parameter, before)


def _take_moments(states: Any, parameter: Any, before: torch.Size, kept: Tensor, dim: int) -> None:
    """The parts of the moments that belong to what is kept; none where they are of other shapes."""
    moments = {k: v for k, v in states.get(parameter, {}).items() if isinstance(v, Tensor) and v.dim()}
    if any(one.shape != before for one in moments.values()):
        states.pop(parameter)
        return
    for key, one in moments.items():
        states[parameter][key] = one.index_select(dim, kept)


def _note(config: Any, name: str, rank: int, alpha: float) -> None:
    """The layer's rank and alpha before any other pattern, of which the first that matches counts."""
    key = re.escape(name)
    config.rank_pattern = {key: rank, **{k: v for k, v in config.rank_pattern.items() if k != key}}
    config.alpha_pattern = {key: alpha, **{k: v for k, v in config.alpha_pattern.items() if k != key}}
