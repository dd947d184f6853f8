"""Adapters of any method as pools take them: lowered once."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters.lowered import low_rank_of
from ..nn.adapted import lora_layers
from ..nn.wrappers import plain_names
from .host import Factors


def lower_adapter(
    model: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Factors], dict[str, float]]:
    """The A and B of each layer, and its s: ``pool.register(name, *lower_adapter(model))``.

    They are computed once, here, whatever the method makes them of; what trains later does not count.

    Args:
        model: one that has the adapter.
        adapter_name: which.

    Raises:
        ValueError: no such adapter; a method without such factors, which the message names; or a layer of
            another kind than a linear or an embedding.
    """
    names = plain_names(model)
    factors: dict[str, Factors] = {}
    scalings: dict[str, float] = {}
    for name, layer in lora_layers(model).items():
        adapter: Any = dict(layer.adapters.items()).get(adapter_name)
        if adapter is None:
            continue
        if layer.base_weight.dim() != 2:
            raise ValueError(
                f"model: {name}: expected a linear or an embedding, got {layer.base_type.__name__}"
            )
        lora_a, lora_b, scalings[names[name]] = low_rank_of(adapter)
        factors[names[name]] = (lora_a, lora_b)
    if not factors:
        raise ValueError(f"adapter_name: expected an adapter of the model, got {adapter_name!r}")
    return factors, scalings
