"""What several schedules do: move adapters into W, start them anew, forget what an optimiser knows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.adapter_layer import AdapterLayer
from ..nn.pairs import Pair
from ..nn.quantized import QuantizedLoRALinear
from ..ops.dequantize import dequantize
from ..optim._common import pairs_of
from ..quant import QuantizedWeight, quantize


def site_name(pair: Pair) -> str:
    """What tells a pair apart in a state: its layer and its adapter."""
    return f"{pair.name}:{pair.adapter}"


def generator(seed: int) -> torch.Generator:
    """A generator of a schedule's own, so that its draws depend on its seed and its checkpoint alone.

    Raises:
        TypeError: ``seed`` is no int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    return torch.Generator().manual_seed(seed)


def active_of(model: nn.Module, method: str) -> dict[str, Any]:
    """The active adapters of ``method``, by the name of their layer.

    Raises:
        ValueError: there are none.
    """
    found = {
        name: layer.adapters[key]
        for name, layer in model.named_modules()
        if isinstance(layer, AdapterLayer)
        for key in layer.active
        if layer.adapters[key].method == method
    }
    if not found:
        raise ValueError(f"model: expected adapters of LoRAConfig(method={method!r}), got none")
    return found


def mergeable_pairs(model: nn.Module) -> list[Pair]:
    """The pairs of ``model``, each of which :func:`merge_` can move into its W.

    Raises:
        TypeError: not a module.
        ValueError: there are none, or one is more than s · B A or has taken its start out of W, or its W is
            tied to another module's, is no matrix, or is quantised in a way that is not ours.
    """
    pairs = pairs_of(model)
    holders = _holders(model)
    for pair in pairs:
        if not pair.plain:
            raise ValueError(
                f"model: {pair.name}: expected an adapter that is s · B A and no more, got another"
            )
        if pair.lora_a.dim() != 2 or pair.lora_b.dim() != 2:
            raise ValueError(f"model: {pair.name}: expected a linear or an embedding, got {pair.base}")
        if pair.weight is None and not isinstance(pair.layer, QuantizedLoRALinear):
            raise ValueError(f"model: {pair.name}: expected a dense weight or one of ours, got {pair.base}")
        if getattr(pair.layer, "_taker", None) is not None:
            raise ValueError(f"model: {pair.name}: expected a W that no start took from, got what one left")
        base: Any = pair.base
        if holders.get(id(base.weight), 1) > 1:
            raise ValueError(f"model: {pair.name}: expected a weight of its own, got one that is tied")
    return pairs


def _holders(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def check_unmerged(pairs: Iterable[Pair]) -> None:
    """Raises where a layer is merged at this moment."""
    for pair in pairs:
        layer: Any = pair.layer
        if layer.merged:
            raise ValueError(f"model: {pair.name}: expected adapters that are not merged, got a merged layer")


@torch.no_grad()
def merge_(pair: Pair, factor: float = 1.0) -> None:
    """W ← W + factor · s · B A, in place; a quantised W is dequantised, added to and quantised again."""
    scale = factor * pair.scaling
    if isinstance(pair.layer, QuantizedLoRALinear):
        _requantize_(pair.layer, pair, scale)
        return
    weight: Any = pair.weight
    wide = torch.promote_types(weight.dtype, pair.lora_a.dtype)
    if weight.dtype == wide == pair.lora_a.dtype:
        weight.addmm_(pair.lora_b, pair.lora_a, alpha=scale)
    else:  # rounded once
        weight.copy_(weight.to(wide).addmm_(pair.lora_b.to(wide), pair.lora_a.to(wide), alpha=scale))


def _requantize_(layer: QuantizedLoRALinear, pair: Pair, scale: float) -> None:
    old = layer.weight
    wide = torch.promote_types(old.dtype, torch.float32)
    dense = dequantize(old, wide).addmm_(pair.lora_b.to(wide), pair.lora_a.to(wide), alpha=scale)
    layer._hold(quantize(dense.to(old.dtype), old.format, **_options(old)))


def _options(weight: QuantizedWeight) -> dict[str, Any]:
    """What :func:`quantize` was told when it made such a weight."""
    if weight.format == "nf4":
        return {"block_size": weight.block, "double_quant": weight.nested is not None}
    return {"per_tensor": weight.scales.numel() == 1} if weight.format == "fp8" else {}


@torch.no_grad()
def restart_(pair: Pair, rng: torch.Generator) -> None:
    """A ← Kaiming-uniform, B ← 0, as LoRA starts; of an embedding A ← 0 and B normal."""
    if pair.is_embedding:
        pair.lora_a.zero_()
        fill_(pair.lora_b, rng, "normal_")
    else:
        fill_kaiming_(pair.lora_a, rng)
        pair.lora_b.zero_()


def fill_kaiming_(factor: Tensor, rng: torch.Generator) -> None:
    """Uniform numbers within 1/√(last size)."""
    bound = 1 / math.sqrt(factor.shape[-1])
    fill_(factor, rng, "uniform_", -bound, bound)


@torch.no_grad()
def fill_(tensor: Tensor, rng: torch.Generator, how: str, *args: float) -> Tensor:
    """Numbers of ``rng``, drawn on the CPU and in at least float32: the same on every device."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.copy_(getattr(torch.empty(tensor.shape, dtype=wide), how)(*args, generator=rng))


def forget_(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Drops what the optimiser knows of these parameters: it starts with them as on its first step."""
    for parameter in params:
        optimizer.state.pop(parameter, None)


def factors(pairs: Iterable[Pair]) -> list[nn.Parameter]:
    """Every A and B that trains."""
    return [one for pair in pairs for one in (pair.lora_a, pair.lora_b) if one.requires_grad]
