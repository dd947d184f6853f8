"""RandLoRA (Albert et al., 2025, arXiv 2502.00987): full rank, of random bases that are scaled by vectors."""

from __future__ import annotations

from typing import Any

from peft.tuners.randlora.layer import Linear
from torch import Tensor

from ...adapters.update import Dense, LowRank
from .base import FusedTuner, dropout_now, linear
from .wide import product


class FusedRandLora(FusedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, the smaller of A and B scaled by rank and by column."""

    per_adapter = "randlora_lambda"
    dropouts = "randlora_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank | Dense:
        """PEFT's A and B."""
        lora_a, lora_b = self.get_scaled_bases(name, device=x.device)
        made = product(x, dropout_now(self, name), (lora_b, lora_a))
        if isinstance(made, LowRank):
            return made._replace(scaling=self.scaling[name])
        return Dense(made.delta * self.scaling[name])


TAKEOVERS = {Linear: linear(FusedRandLora)}
