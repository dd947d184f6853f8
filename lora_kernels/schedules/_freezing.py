"""Freezing a factor for good."""

from __future__ import annotations

from typing import Any

from ..nn.adapter_layer import AdapterLayer
from ..nn.pairs import Pair


def freeze(pair: Pair, name: str) -> None:
    """Takes ``lora_A`` or ``lora_B`` out of training, also when its adapter is chosen anew."""
    parameter = pair.lora_a if name == "lora_A" else pair.lora_b
    parameter.requires_grad_(False)
    parameter.grad = None
    if isinstance(pair.layer, AdapterLayer):
        adapter: Any = pair.layer.adapters[pair.adapter]
        adapter.frozen = adapter.frozen | {name}
