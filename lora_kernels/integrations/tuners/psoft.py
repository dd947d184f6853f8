"""PSOFT (Wu et al., 2025, arXiv 2505.11235): W's principal part turned by a small orthogonal matrix."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.psoft.layer import Linear
from torch import Tensor

from ...adapters.update import LowRank
from .base import FusedTuner, linear


class FusedPsoft(FusedTuner, Linear):
    """y = x Wᵀ + b + s · drop(x) Aᵀ (B (R - I))ᵀ, A and B frozen."""

    per_adapter = "psoft_R"
    dropouts = "psoft_dropout"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """R - I goes into B, so that A has no gradient and x need not be saved."""
        lora_a, lora_b = self._psoft_A_cache[name], self._psoft_B_cache[name]
        turned = self.psoft_R[name].get_matrix().to(lora_b.dtype)
        turn = turned - torch.eye(len(turned), dtype=turned.dtype, device=turned.device)
        return LowRank(lora_a, lora_b @ turn, self.scaling[name])


TAKEOVERS = {Linear: linear(FusedPsoft)}
