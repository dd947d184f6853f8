"""Narrower layers that are views of wide ones: LoNAS's sub-networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...adapters import LowRank, apply_update, current_call
from ..adapted import lora_layers
from ..adapter_layer import AdapterLayer
from ..linear import LoRALinear


class Slice(NamedTuple):
    """The first ranks, outputs and inputs of a layer; ``None`` for all of them."""

    rank: int | None = None
    out_features: int | None = None
    in_features: int | None = None


@contextlib.contextmanager
def elastic(model: nn.Module, slices: Mapping[str, Slice]) -> Iterator[None]:
    """Inside the ``with`` block layers compute y = x W[:o, :i]ᵀ + b[:o] + s · x A[:ρ, :i]ᵀ B[:o, :ρ]ᵀ

    LoNAS's sub-networks (Muñoz et al., LREC-COLING 2024). All are views, so nothing is copied, and a backward
    pass gives gradients to the slice alone; it belongs into the block where activations are checkpointed. x
    of a narrowed layer has i features: who narrows one layer narrows what reads it. The model's layers are
    changed for every thread, one block at a time.

    Args:
        model: one whose adapters are plain LoRA's or ``lonas``'s.
        slices: dotted name of a layer → its slice.

    Raises:
        ValueError: no such layer, one that is no :class:`LoRALinear` with one active adapter of A and B, a
            size that it has not, or a quantised weight that would be narrowed.
        RuntimeError: a layer is merged.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 8)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> with elastic(model, {"0": Slice(out_features=6)}):
        ...     model(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """
    layers = check_slices(model, slices)
    for name, one in slices.items():
        layers[name].__dict__["forward"] = partial(_forward, layers[name], one)
    try:
        yield
    finally:
        for name in slices:
            del layers[name].__dict__["forward"]


def check_slices(model: nn.Module, slices: Mapping[str, Slice]) -> dict[str, Any]:
    """The layers of the model, where the slices fit them; :func:`elastic` says what is raised."""
    layers = lora_layers(model)
    for name, one in slices.items():
        _check(name, layers.get(name), one)
    return layers


def _check(name: str, layer: AdapterLayer | None, one: Slice) -> None:
    if not isinstance(layer, LoRALinear) or not layer.plain_forward or "forward" in vars(layer):
        raise ValueError(f"slices: expected layers that are a LoRALinear, got {name!r}")
    layer._must_be_unmerged("narrow the layer")
    if not layer.enabled or len(layer.active) != 1 or not layer.adapters[layer.active[0]].plain:
        raise ValueError(f"slices: {name}: expected one active adapter of A and B, got {list(layer.active)}")
    most = Slice(layer.adapters[layer.active[0]].r, layer.out_features, layer.in_features)
    for field, size, whole in zip(Slice._fields, one, most, strict=True):
        if size is not None and not 1 <= size <= whole:
            raise ValueError(f"slices: {name}: expected {field} of 1 to {whole}, got {size}")
    narrow = any(size is not None for size in one[1:])
    if narrow and not isinstance(layer._own_weight, Tensor):
        raise ValueError(f"slices: {name}: expected a dense weight to narrow, got a quantised one")


def _forward(layer: Any, one: Slice, x: Tensor) -> Tensor:
    adapter = layer.adapters[layer.active[0]]
    lora_a, lora_b, scaling, gate, *_ = adapter.lower(x, current_call())
    rank, outs, ins = one
    gate = None if gate is None else gate[..., :rank]
    update = LowRank(lora_a[:rank, :ins], lora_b[:outs, :rank], scaling, gate)
    weight = layer._own_weight if outs is ins is None else layer._own_weight[:outs, :ins]
    bias = None if layer.bias is None else layer.bias[:outs]
    return apply_update(x, weight, bias, update, adapter.lora_dropout if layer.training else 0.0)
