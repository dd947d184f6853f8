"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454): A and B shared and frozen, two vectors a layer trained."""

from __future__ import annotations

from typing import Any

from peft.tuners.vera.layer import Linear
from torch import Tensor

from ...adapters.update import LowRank
from .base import GroupedTuner, linear


class FusedVera(GroupedTuner, Linear):
    """y = x Wᵀ + b + ((drop(x) Aᵀ) ⊙ d) (b' ⊙ B)ᵀ: d is the gate, and B's rows carry b'."""

    per_adapter = "vera_lambda_d"
    dropouts = "vera_dropout"
    frozen_a = True

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """The slices of the shared A and B that fit this layer."""
        lora_a = self.vera_A[name][:, : self.in_features].to(x.device)
        lora_b = self.vera_B[name][: self.out_features].to(x.device)
        lora_b = lora_b * self.vera_lambda_b[name][:, None]
        return LowRank(lora_a, lora_b, 1.0, self.vera_lambda_d[name])


TAKEOVERS = {Linear: linear(FusedVera)}
