"""TinyLoRA (Morris et al., 2026, arXiv 2602.04118): a core of a few numbers between W's singular vectors."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.tinylora.layer import Embedding, Linear
from torch import Tensor, nn

from ...adapters.update import Branched, LowRank
from ...nn.embedding import embed
from ..peft_linear import PeftNamed
from .base import FusedTuner, Takeover, cored, dropout_now, linear, names_now, why_not_now


class FusedTinyLora(FusedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + drop(x) Aᵀ (B R)ᵀ, R = Σ_i v_i P_i and all but v frozen."""

    per_adapter = "tinylora_A"
    dropouts = "tinylora_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank | Branched:
        """R is the core."""
        lora_a, lora_b, core = self.tinylora_A[name], self.tinylora_B[name], self._compute_R(name)
        return cored(lora_a, core.to(lora_b.dtype), lora_b, 1.0, dropout_now(self, name))


class FusedTinyLoraEmbedding(PeftNamed, Embedding):
    """y_t = E[t] + drop(B[t]) R A, added to what was looked up in place."""

    per_adapter = "tinylora_A"
    dropouts = "tinylora_dropout"

    def why_not_adapter(self, name: str) -> str | None:
        """All are covered."""
        return None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, or PEFT's forward where this call is none of ours."""
        names = [] if args or kwargs else names_now(self)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return embed(self.base_layer, x, [self._low_rank(name, x) for name in names])

    def _low_rank(self: Any, name: str, x: Tensor) -> LowRank:
        """Of Eᵀ; the rows' dropout is a gate of zeros and 1 / (1 - p)."""
        lora_a, lora_b = self.tinylora_A[name], self.tinylora_B[name]
        p = dropout_now(self, name)
        gate = F.dropout(lora_b.new_ones(x.numel(), lora_b.shape[1]), p) if p else None
        return LowRank(lora_b.T, (self._compute_R(name).to(lora_a.dtype) @ lora_a).T, 1.0, gate)


def _why_not_embedding(layer: Any) -> str | None:
    base = layer.base_layer
    if type(base) is not nn.Embedding or "forward" in vars(layer):
        return f"its base layer is a {type(base).__name__}, or its forward was replaced"
    # With max_norm the base's look-up would shorten B's rows too, which PEFT's does not.
    return "its embedding has max_norm" if base.max_norm else why_not_now(layer, FusedTinyLoraEmbedding)


TAKEOVERS = {
    Linear: linear(FusedTinyLora),
    Embedding: Takeover(FusedTinyLoraEmbedding, _why_not_embedding),
}
