"""What makes VLoRA's factors: an image's features to an A for each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...adapters.generated.vlora import VLoRA
from ..adapted import lora_layers

_STD = 0.02


class _Decoder(nn.Module):
    """Queries, one a layer, that attend to the features; the A of each."""

    def __init__(self, layers: int, width: int, depth: int, heads: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.queries = nn.Parameter(torch.zeros(1, layers, width).normal_(std=_STD))
        block = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerDecoder(block, depth, norm=nn.LayerNorm(width))
        self.to_factors = nn.Linear(width, in_features * rank)

    def forward(self, memory: Tensor) -> Tensor:
        """A ``[samples, layers, rank, in]``."""
        queries = self.queries.expand(len(memory), -1, -1)
        return self.to_factors(self.blocks(queries, memory)).unflatten(-1, (self.rank, -1))


class VLoRAGenerator(nn.Module):
    """A_b = decoder(features_b Pᵀ + position): what ``side_inputs(model, vlora_A=...)`` takes

    VLoRA's perceptual weight generator (Ma et al., 2024, arXiv 2405.20339). Layers of one kind (the last part
    of their names) share a decoder, which has a query for each of them. Its branch beside a whole MLP ("m")
    is not here.

    features are ``[samples, tokens, vision_width]``; the result is layer → ``[samples, r, in]``.

    Args:
        model: one with ``vlora`` adapters.
        vision_width: of the features.
        tokens: how many there are of an image.
        width: of the decoders.
        depth: blocks of a decoder.
        heads: of its attention.
        adapter_name: whose layers.

    Raises:
        ValueError: ``model`` has no such adapter, layers of one kind differ in shape, or features do.
    """

    def __init__(
        self,
        model: nn.Module,
        vision_width: int,
        tokens: int,
        width: int = 1024,
        depth: int = 8,
        heads: int = 16,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        self.shape = (tokens, vision_width)
        kinds = _by_kind(model, adapter_name)
        self.layers = [[adapter.site for adapter in adapters] for adapters in kinds]
        self.project = nn.Linear(vision_width, width)
        self.position = nn.Parameter(torch.zeros(1, tokens, width).normal_(std=_STD))
        self.decoders = nn.ModuleList(
            _Decoder(len(adapters), width, depth, heads, adapters[0].in_features, adapters[0].r)
            for adapters in kinds
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """The A of each layer, for features ``[samples, tokens, vision_width]``."""
        if features.dim() != 3 or tuple(features.shape[1:]) != self.shape:
            want = f"[samples, {self.shape[0]}, {self.shape[1]}]"
            raise ValueError(f"features: expected {want}, got {tuple(features.shape)}")
        memory = self.project(features) + self.position
        found: dict[str, Tensor] = {}
        for names, decoder in zip(self.layers, self.decoders, strict=True):
            found.update(zip(names, decoder(memory).unbind(1), strict=True))
        return found


def _by_kind(model: nn.Module, adapter_name: str) -> list[list[VLoRA]]:
    """The adapters of each kind of layer."""
    kinds: dict[str, list[VLoRA]] = {}
    for name, layer in lora_layers(model).items():
        adapter = dict(layer.adapters.items()).get(adapter_name)
        if isinstance(adapter, VLoRA):
            kinds.setdefault(name.rpartition(".")[2], []).append(adapter)
    if not kinds:
        raise ValueError(f"model: expected layers with a vlora adapter {adapter_name!r}, got none")
    for kind, adapters in kinds.items():
        shapes = {(adapter.in_features, adapter.r) for adapter in adapters}
        if len(shapes) > 1:
            raise ValueError(
                f"model: expected layers {kind!r} of one input size and rank, got {sorted(shapes)}"
            )
    return list(kinds.values())
