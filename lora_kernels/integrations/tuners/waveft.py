"""WaveFT (Bilican et al., 2025, arXiv 2505.12532): few coefficients of ΔW's wavelet transform."""

from __future__ import annotations

from typing import Any

from peft.tuners.waveft.layer import WaveFTLinear
from torch import Tensor

from ...adapters.update import Dense
from .base import FusedTuner, linear


class FusedWaveFT(FusedTuner, WaveFTLinear):
    """y = x (W + ΔW)ᵀ + b: PEFT's ΔW, in one product where PEFT has two."""

    per_adapter = "waveft_spectrum"

    def update(self: Any, name: str, x: Tensor) -> Dense:
        """ΔW as PEFT makes it."""
        return Dense(self.get_delta_weight(name))


TAKEOVERS = {WaveFTLinear: linear(FusedWaveFT)}
