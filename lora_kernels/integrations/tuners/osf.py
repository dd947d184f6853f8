"""OSF (Nayak et al., 2025, arXiv 2504.07097): W's smaller singular vectors train, the others stay."""

from __future__ import annotations

from typing import Any

from peft.tuners.osf.layer import Linear
from torch import Tensor

from ...adapters.update import Branched, Dense, LowRank
from .base import FusedTuner, linear
from .wide import moved


class FusedOsf(FusedTuner, Linear):
    """y = x Wᵀ + b + x (U S V - U₀ S₀ V₀)ᵀ; PEFT's hooks on U and V project the gradients."""

    per_adapter = "osf_svd_params"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Of several PEFT computes the first alone."""
        return "several adapters are active" if len(self.active_adapters) > 1 else None

    def update(self: Any, name: str, x: Tensor) -> LowRank | Branched | Dense:
        """The singular vectors now, and those that W has."""
        now = self.osf_svd_params[name]
        left, values = self._osf_U_low_init[name], self._osf_S_low_init[name]
        pair = now["U_low"] * now["S_low"], now["V_low"]
        return moved(x, pair, (left * -values, self._osf_V_low_init[name]))


TAKEOVERS = {Linear: linear(FusedOsf)}
