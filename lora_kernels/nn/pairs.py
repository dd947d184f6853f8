"""A, B and s of every adapted layer, for what acts at or between the steps of an optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters import LoRA
from .adapter_layer import AdapterLayer


class Pair(NamedTuple):
    """ΔW = s · B A of one active adapter on one layer.

    A is ``[r, in]`` and B ``[out, r]``; those of a convolution of PEFT keep its shapes.
    """

    name: str  # of the layer, dotted
    adapter: str
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float
    layer: nn.Module
    dropout_p: float  # of x; an embedding has none
    # Whether the layer adds s · B A x and does nothing else: no gate, no magnitude, no bias of B.
    plain: bool

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[0]

    @property
    def base(self) -> nn.Module:
        """The module that holds W."""
        return getattr(self.layer, "base_layer", self.layer)

    @property
    def is_embedding(self) -> bool:
        """Whether W is a table that is looked up."""
        return isinstance(self.base, nn.Embedding)

    @property
    def weight(self) -> Tensor | None:
        """W as [out, in], a view of the parameter; ``None`` where it is quantised."""
        layer: Any = self.layer
        weight = layer.base_weight if isinstance(layer, AdapterLayer) else layer.get_base_layer().weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return None
        if isinstance(layer, AdapterLayer):
            return layer._matrix(weight)
        transposed = self.is_embedding or getattr(layer, "fan_in_fan_out", False)
        return weight.T if transposed else weight.flatten(1)


def lora_pairs(model: nn.Module) -> Iterator[Pair]:
    """A, B and s of each layer's active adapters, on models of :func:`apply_lora` and of PEFT.

    A method without an A and a B of its own has no pairs.

    Raises:
        TypeError: ``model`` is not a module.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> [pair.lora_a.shape for pair in lora_pairs(model)]
        [torch.Size([2, 4])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer):
            yield from _own(name, layer)
        elif isinstance(getattr(layer, "scaling", None), dict) and hasattr(layer, "lora_embedding_A"):
            yield from _of_peft(name, layer)


def _own(name: str, layer: AdapterLayer) -> Iterator[Pair]:
    for key in layer.active:
        adapter: Any = layer.adapters[key]
        lora_a, lora_b = getattr(adapter, "lora_A", None), getattr(adapter, "lora_B", None)
        if isinstance(lora_a, nn.Parameter) and isinstance(lora_b, nn.Parameter):
            plain = type(adapter).lower is LoRA.lower
            p = 0.0 if isinstance(layer, nn.Embedding) else adapter.lora_dropout
            yield Pair(name, key, lora_a, lora_b, adapter.scaling, layer, p, plain)


def _of_peft(name: str, layer: Any) -> Iterator[Pair]:
    for key in layer.active_adapters:
        if key in layer.lora_A:
            lora_a, lora_b, dropout = (
                layer.lora_A[key].weight,
                layer.lora_B[key].weight,
                layer.lora_dropout[key],
            )
        elif key in layer.lora_embedding_A:
            lora_a, lora_b, dropout = layer.lora_embedding_A[key], layer.lora_embedding_B[key], None
        else:
            continue
        p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        plain = key not in layer.lora_variant and not layer.lora_bias.get(key)
        yield Pair(name, key, lora_a, lora_b, layer.scaling[key], layer, p, plain)
