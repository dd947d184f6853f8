"""PEANuT: ΔW as a small network makes it of W."""

from __future__ import annotations

from typing import Any

from peft.tuners.peanut.layer import Linear
from torch import Tensor

from ...adapters.update import Dense
from .base import FusedTuner, linear


class FusedPeanut(FusedTuner, Linear):
    """y = x (W + ΔW)ᵀ + b: PEFT's ΔW, in one product where PEFT has two."""

    per_adapter = "peanut_A"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> Dense:
        """ΔW as PEFT makes it."""
        return Dense(self.get_delta_weight(name))


TAKEOVERS = {Linear: linear(FusedPeanut)}
