"""PSOFT (Wu et al., 2025, arXiv 2505.11235): W's principal part turned by a small orthogonal matrix."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.psoft.layer import Linear
from torch import Tensor

from ...adapters.update import Branched, LowRank
from .base import FusedTuner, cored, dropout_now, linear


class FusedPsoft(FusedTuner, Linear):
    """y = x Wᵀ + b + s · drop(x) Aᵀ (B (R - I))ᵀ, A and B frozen."""

    per_adapter = "psoft_R"
    dropouts = "psoft_dropout"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> LowRank | Branched:
        """R - I is the core."""
        lora_a, lora_b = self._psoft_A_cache[name], self._psoft_B_cache[name]
        turned = self.psoft_R[name].get_matrix().to(lora_b.dtype)
        turn = turned - torch.eye(len(turned), dtype=turned.dtype, device=turned.device)
        return cored(lora_a, turn, lora_b, self.scaling[name], dropout_now(self, name))


TAKEOVERS = {Linear: linear(FusedPsoft)}
