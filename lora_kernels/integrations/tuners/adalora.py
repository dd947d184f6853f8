"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): singular values between A and B, pruned as it goes."""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor

from ...adapters.update import LowRank
from .base import GroupedTuner, linear


class FusedAdaLora(GroupedTuner, SVDLinear):
    """y = x Wᵀ + b + α / (r + 10⁻⁵) · ((drop(x) Aᵀ) ⊙ E) Bᵀ: E is the gate, r what PEFT's allocator left.

    The parameters are PEFT's own, so that its orthogonality loss and its ``RankAllocator`` see them.
    """

    per_adapter = "lora_A"
    dropouts = "lora_dropout"
    in_dtype_of_x = False

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Whether the allocator has left it any rank."""
        return None if len(self.lora_A[name]) else f"adapter {name!r} has rank 0"

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """The scale goes into the gate: r is a tensor."""
        scale = self.scaling[name] / (self.ranknum[name] + 1e-5)
        return LowRank(self.lora_A[name], self.lora_B[name], 1.0, self.lora_E[name][:, 0] * scale)


TAKEOVERS = {SVDLinear: linear(FusedAdaLora)}
