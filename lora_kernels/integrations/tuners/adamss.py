"""AdaMSS: a small LoRA for each cluster of W's rows, behind W's own singular vectors."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adamss.layer import Linear
from torch import Tensor

from ...adapters.update import LowRank, Shifted
from .base import FusedTuner, base_of, linear


class FusedAdamss(FusedTuner, Linear):
    """y = x Wᵀ + b + [x 1] (B A V)ᵀ: A the subspaces' side by side, each B_i in the rows of its cluster

    V, of the singular vectors of [W b], is frozen: A V is taken together, and the rank is that of all A_i.
    PEFT writes [x 1], goes through V's rank and scatters what the subspaces add.
    """

    per_adapter = "adamss_A"

    def update(self: Any, name: str, x: Tensor) -> LowRank | Shifted:
        """What is V's last column, where there is a bias, shifts it."""
        lora_b = torch.block_diag(*self.adamss_B[name])
        lora_b = torch.zeros_like(lora_b).index_copy(0, self.scatter_index[name].to(x.device), lora_b)
        within, frozen = torch.cat([*self.adamss_A[name]]), self.adamss_newB[name]
        update = LowRank(within @ frozen[:, : self.in_features].to(within.dtype), lora_b)
        if base_of(self)[1] is None:
            return update
        return Shifted(update, lora_b @ (within @ frozen[:, self.in_features].to(within.dtype)))


TAKEOVERS = {Linear: linear(FusedAdamss)}
