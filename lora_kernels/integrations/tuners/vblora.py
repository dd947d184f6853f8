"""VB-LoRA (Li et al., 2024, arXiv 2405.15179): A and B put together from a bank of vectors of all layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.vblora.layer import Linear
from torch import Tensor

from ...adapters.generated.vblora import composed
from ...adapters.update import LowRank
from .base import GroupedTuner, linear


class FusedVBLora(GroupedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + drop(x) Aᵀ Bᵀ, each run of a row of A or a column of B a mean of the bank's vectors."""

    per_adapter = "vblora_logits_A"
    dropouts = "vblora_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """A and B; where the vectors cannot train, PEFT says so."""
        logits, bank = self.vblora_logits_A[name], self.vblora_vector_bank[name].to(x.device)
        if self.training and not torch.compiler.is_compiling() and logits[0, 0].isinf().any():
            self._get_lora_matrices(name)  # raises
        return LowRank(*composed(logits, self.vblora_logits_B[name], bank, self.topk[name]))


TAKEOVERS = {Linear: linear(FusedVBLora)}
