"""Uni-LoRA (Li et al., 2025, arXiv 2506.00799): every number of A and B is one of a short vector's."""

from __future__ import annotations

from typing import Any

from peft.tuners.unilora.layer import Linear
from torch import Tensor

from ...adapters.update import LowRank
from .base import GroupedTuner, linear


class FusedUniLora(GroupedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + drop(x) Aᵀ Bᵀ with A = θ[i] ⊙ c and B = θ[j] ⊙ d."""

    per_adapter = "unilora_indices_A"
    dropouts = "unilora_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """A and B."""
        theta = self.unilora_theta_d[name]
        lora_a = _picked(theta, self.unilora_indices_A[name]) * self.unilora_scales_A[name]
        return LowRank(lora_a, _picked(theta, self.unilora_indices_B[name]) * self.unilora_scales_B[name])


def _picked(theta: Tensor, indices: Tensor) -> Tensor:
    """θ[i]; on the CPU by the way whose gradient takes a quarter of the time and is summed in order there."""
    theta = theta.to(indices.device)
    if theta.device.type != "cpu":
        return theta[indices]
    return theta.index_select(0, indices.view(-1)).view(indices.shape)


TAKEOVERS = {Linear: linear(FusedUniLora)}
