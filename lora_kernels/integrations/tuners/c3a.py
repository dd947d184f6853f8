"""C³A (Chen et al., 2024, arXiv 2407.19342): ΔW of circular blocks."""

from __future__ import annotations

from typing import Any

from peft.tuners.c3a.layer import C3ALinear
from torch import Tensor

from ...adapters.update import Branched
from ...ops.block_circular import BlockCircular
from .base import FusedTuner, linear


class FusedC3A(FusedTuner, C3ALinear):
    """y = x Wᵀ + b + x ΔWᵀ / in by half spectra, of which PEFT transforms both halves.

    Otherwise than in PEFT 0.21.2 the gradient of x is ΔW's, not that of each block's transpose, and several
    adapters add up, as they do merged: PEFT gives each of them what the one before it made.
    """

    per_adapter = "c3a_kernel"

    def update(self: Any, name: str, x: Tensor) -> Branched:
        """In float32 at least."""
        return Branched(BlockCircular(self.out_features, 1 / self.in_features), (self.c3a_kernel[name],))


TAKEOVERS = {C3ALinear: linear(FusedC3A)}
