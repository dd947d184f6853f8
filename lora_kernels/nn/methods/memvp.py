"""MemVP: what an image says joins the feed-forward layers as more keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters import LowRank, apply_update, current_call
from ..wrappers import unwrapped

_SHRINK, _STD = 0.01, 0.02


class MemVPMemory(nn.Module):
    """K = Z + E₁ and V = Z + E₂ with Z = 0.01 · fc₂(SiLU(fc₁(I))), filled up with rows of 0

    MemVP (Jie et al., 2024, arXiv 2405.05615). One for all layers of a model; it gives what
    ``side_inputs(model, memory=...)`` takes. fc₁, fc₂, E₁ (N(0, 0.02²)) and E₂ (0) train.

    I are an image's tokens ``[samples, tokens, vision_width]``; K and V are ``[samples, entries, width]``.

    Args:
        width: of the model.
        entries: rows of E₁ and E₂, at least as many as tokens.
        vision_width: of the image's tokens.
        bottleneck: between fc₁ and fc₂.

    Raises:
        ValueError: the tokens are more than ``entries`` or of another width.
    """

    def __init__(
        self, width: int, entries: int = 320, vision_width: int = 1024, bottleneck: int = 128
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(vision_width, bottleneck), nn.Linear(bottleneck, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.keys = nn.Parameter(torch.randn(1, entries, width) * _STD)
        self.values = nn.Parameter(torch.zeros(1, entries, width))

    def forward(self, tokens: Tensor | None = None, samples: int = 1) -> tuple[Tensor, Tensor]:
        """K and V; without tokens those of ``samples`` texts, for which Z is 0."""
        if tokens is None:
            return self.keys.expand(samples, -1, -1), self.values.expand(samples, -1, -1)
        entries, width = self.keys.shape[1], self.down.in_features
        if tokens.dim() != 3 or tokens.shape[1] > entries or tokens.shape[2] != width:
            want = f"[samples, up to {entries}, {width}]"
            raise ValueError(f"tokens: expected {want}, got shape {tuple(tokens.shape)}")
        seen = _SHRINK * self.up(F.silu(self.down(tokens)))
        seen = F.pad(seen, (0, 0, 0, entries - tokens.shape[1]))
        return seen + self.keys, seen + self.values


class MemVPFFN(nn.Module):
    """y = FFN(x) + s · drop(SiLU(x Kᵀ)) V, K and V those of the call

    MemVP (Jie et al., 2024, arXiv 2405.05615) around a feed-forward layer whose input and output are
    ``[samples, tokens, width]``. The sequence gets no longer. s is 0.1 and the dropout 0.1 in the paper.

    Args:
        ffn: the layer, left as it is.
        scale: s.
        dropout: probability in training.

    Raises:
        ValueError: no ``memory`` in the call, or one of other sizes.
    """

    def __init__(self, ffn: nn.Module, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        self.ffn, self.scale, self.dropout = ffn, scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[samples, tokens, width]``."""
        keys, values = current_call()["memory"]
        if x.dim() != 3 or keys.shape[0] != x.shape[0] or keys.shape[2] != x.shape[2]:
            raise ValueError(
                f"memory: expected keys for x of shape {tuple(x.shape)}, got shape {tuple(keys.shape)}"
            )
        h = F.silu(x @ keys.transpose(1, 2).to(x.dtype))
        h = F.dropout(h, self.dropout, self.training)
        update = LowRank(None, values.transpose(1, 2), self.scale, x_lora=h)
        return self.ffn(x) + apply_update(x, None, None, update)


def apply_memvp(model: nn.Module, targets: list[str], scale: float = 0.1, dropout: float = 0.1) -> nn.Module:
    """Wraps the feed-forward layers of these dotted names, or ends of names, and freezes the model.

    Raises:
        ValueError: a name that no module's ends in; the model is then as it was.

    Examples:
        >>> model = apply_memvp(nn.Sequential(nn.Linear(4, 4)), ["0"])
        >>> type(model[0]).__name__
        'MemVPFFN'
    """
    names = [name for name, _ in unwrapped(model).named_modules()]
    found = {one: [name for name in names if name == one or name.endswith(f".{one}")] for one in targets}
    for one, hits in found.items():
        if not hits:
            raise ValueError(f"targets: expected the end of a module's name, got {one!r}")
    model.requires_grad_(False)
    for name in dict.fromkeys(name for hits in found.values() for name in hits):
        parent, _, attribute = name.rpartition(".")
        holder = unwrapped(model).get_submodule(parent)
        setattr(holder, attribute, MemVPFFN(holder.get_submodule(attribute), scale, dropout))
    return model
