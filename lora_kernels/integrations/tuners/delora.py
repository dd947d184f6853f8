"""DeLoRA (Bini et al., 2025, arXiv 2503.18225): each rank's norm held to λ / r of that of W's columns."""

from __future__ import annotations

from typing import Any

from peft.tuners.delora.layer import DeloraLinear
from torch import Tensor

from ...adapters.update import LowRank
from .base import GroupedTuner, linear

_SMALLEST = 1e-4


class FusedDelora(GroupedTuner, DeloraLinear):
    """y = x Wᵀ + b + ((drop(x) (A ⊙ n)ᵀ) ⊙ g) Bᵀ, n the norms of W's columns, g_i = λ / (r ‖A_i‖ ‖B^i‖)."""

    per_adapter = "delora_A"
    dropouts = "delora_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """n goes into A, which is smaller than x."""
        lora_a, lora_b = self.delora_A[name], self.delora_B[name]
        norms = lora_a.norm(dim=1).clamp(min=_SMALLEST) * lora_b.norm(dim=0).clamp(min=_SMALLEST)
        gate = self.delora_lambda[name] / self.r[name] / norms
        return LowRank(lora_a * self.delora_w_norm[name], lora_b, 1.0, gate)


TAKEOVERS = {DeloraLinear: linear(FusedDelora)}
