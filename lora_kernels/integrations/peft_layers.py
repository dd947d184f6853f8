"""PEFT's LoRA ``Embedding`` and convolutions with a forward of fewer passes; see :mod:`.peft`."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Conv1d as PeftConv1d
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Conv3d as PeftConv3d
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
)
from torch import Tensor, nn

from ..adapters import LowRank
from ..nn.conv import convolve
from ..nn.embedding import embed
from .peft_linear import PeftNamed, hooked_inside, magnitude_of, scale_and_gate

_DORA = (DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_DROPOUTS = (type(None), nn.Identity, nn.Dropout)  # none: the layer has no such adapter
_BASES = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FusedLoraEmbedding(PeftNamed, PeftEmbedding):
    """PEFT's LoRA ``Embedding``; what the adapters add goes straight into what was looked up."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        if args or kwargs or self.disable_adapters or self.merged or _changed(self):
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_embedding_A]
        base: Any = self.base_layer
        return embed(base, x, [_embedding_factors(self, name) for name in names])


def _embedding_factors(layer: Any, name: str) -> LowRank:
    return _factors(layer, name, layer.lora_embedding_A[name], layer.lora_embedding_B[name])


def _factors(layer: Any, name: str, lora_a: Tensor, lora_b: Tensor) -> LowRank:
    scaling, gate = scale_and_gate(layer.scaling[name], lora_a)
    magnitude = _magnitude(layer, name)
    if magnitude is None or gate is None:
        return LowRank(lora_a, lora_b, scaling, gate, None, magnitude)
    return LowRank(lora_a, lora_b * gate, scaling, None, None, magnitude)


class _FusedLoraConv(PeftNamed):
    """PEFT's LoRA convolution; the map from ranks to channels adds to the base's output as it runs."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        ours = names and not (args or kwargs or self.disable_adapters or self.merged or _changed(self))
        if not ours or x.dtype != base.weight.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return convolve(base, x, [(_conv_factors(self, name), _dropout(self, name)) for name in names])


def _conv_factors(layer: Any, name: str) -> LowRank:
    lora_a, lora_b = (part[name].weight.flatten(1) for part in (layer.lora_A, layer.lora_B))
    return _factors(layer, name, lora_a, lora_b)


def _dropout(layer: Any, name: str) -> float:
    module = layer.lora_dropout[name]
    return module.p if module.training and isinstance(module, nn.Dropout) else 0.0


def _magnitude(layer: Any, name: str) -> Tensor | None:
    if name not in layer.lora_variant:
        return None
    return magnitude_of(layer.lora_magnitude_vector[name]).flatten()


class FusedLoraConv1d(_FusedLoraConv, PeftConv1d):
    __doc__ = _FusedLoraConv.__doc__


class FusedLoraConv2d(_FusedLoraConv, PeftConv2d):
    __doc__ = _FusedLoraConv.__doc__


class FusedLoraConv3d(_FusedLoraConv, PeftConv3d):
    __doc__ = _FusedLoraConv.__doc__


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    PeftEmbedding: FusedLoraEmbedding,
    PeftConv1d: FusedLoraConv1d,
    PeftConv2d: FusedLoraConv2d,
    PeftConv3d: FusedLoraConv3d,
}


def _changed(layer: Any) -> str | None:
    """Why this call is none of ours, or ``None``; what it asks may change after ``accelerate``."""
    for name in layer.active_adapters:
        variant, dropout = layer.lora_variant.get(name), layer.lora_dropout._modules.get(name)
        if variant is not None and type(variant) not in _DORA:
            return f"adapter {name!r} uses {type(variant).__name__}"
        if variant is not None and dora.ENABLE_DORA_CACHING and not layer.training:
            return "PEFT's DoraCaching keeps its norms"
        if layer.lora_bias.get(name):
            return f"adapter {name!r} has lora_bias"
        if type(dropout) not in _DROPOUTS:
            return f"adapter {name!r} has {type(dropout).__name__} for its dropout, not nn.Dropout"
    return "it has forward or backward hooks inside" if hooked_inside(layer) else None


def why_not(layer: Any) -> str | None:
    """Why a layer of :data:`FUSED` stays PEFT's, or ``None``."""
    base = layer.base_layer
    if type(base) not in _BASES or "forward" in vars(base) or "forward" in vars(layer):
        return f"its base layer is a {type(base).__name__}, not a plain one of torch's"
    if not isinstance(base, nn.Embedding):
        if base.groups != 1 or base.padding_mode != "zeros" or any(d != 1 for d in base.dilation):
            return "its convolution has groups, dilation or a padding mode"
    elif getattr(layer, "tp_layer", None) is not None:
        return "its embedding is split over processes"
    return _changed(layer)
