"""HiRA (Huang et al., 2025, ICLR: Hadamard high-rank adaptation): ΔW = W ⊙ (B A)."""

from __future__ import annotations

from typing import Any

from peft.tuners.hira.layer import Linear
from torch import Tensor

from ...adapters.update import Formed
from ...ops.formed_linear import HadamardUpdate
from .base import FusedTuner, base_of, linear


class FusedHira(FusedTuner, Linear):
    """y = x (W ⊙ (1 + B A))ᵀ + b: one product, of a weight that is made at each call."""

    per_adapter = "hira_A"
    dropouts = "hira_dropout"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> Formed:
        """Of W as it is now."""
        return Formed(HadamardUpdate(), (self.hira_B[name], self.hira_A[name], base_of(self)[0]))


TAKEOVERS = {Linear: linear(FusedHira)}
