"""GraLoRA (Jung et al., 2025, arXiv 2505.20355): W in k × k blocks, each with factors of its own."""

from __future__ import annotations

from typing import Any

from peft.tuners.gralora.layer import Linear
from torch import Tensor

from ...adapters.update import Branched
from ...ops.block_rank import BlockRank
from .base import FusedTuner, dropped, linear


class FusedGraLora(FusedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + the blocks' updates."""

    per_adapter = "gralora_A"
    dropouts = "gralora_dropout"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """The LoRA beside the blocks drops x by bits of its own."""
        return f"adapter {name!r} has a hybrid_r, a LoRA beside the blocks" if self.hybrid_r[name] else None

    def update(self: Any, name: str, x: Tensor) -> Branched:
        """The blocks."""
        branch = BlockRank(self.out_features, self.gralora_k[name], self.scaling[name])
        return Branched(branch, (self.gralora_A[name], self.gralora_B[name]), dropped(self, name, x))


TAKEOVERS = {Linear: linear(FusedGraLora)}
