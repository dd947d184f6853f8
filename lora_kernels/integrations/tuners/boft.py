"""BOFT (Liu et al., 2024, arXiv 2311.06243) of one butterfly factor: x turned by blocks, y scaled."""

from __future__ import annotations

from typing import Any

from peft.tuners.boft.layer import Linear
from torch import Tensor

from ...adapters.update import Scaled
from ...ops.block_diagonal import block_diagonal
from .base import FusedTuner, linear


class FusedBoft(FusedTuner, Linear):
    """y = (x diag(R_1, …, R_n)) Wᵀ ⊙ s + b, R_i orthogonal by PEFT's own Cayley transform

    PEFT makes an in by in matrix of the blocks, in two products of that size, and multiplies x by it.
    """

    per_adapter = "boft_R"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """More factors permute x between them; without its CUDA extension PEFT makes one."""
        if sum(one in self.boft_R for one in self.active_adapters) > 1:
            return "its active adapters turn x one after the other"
        factors = len(self.boft_R[name])
        return f"adapter {name!r} has {factors} butterfly factors, not one" if factors > 1 else None

    def update(self: Any, name: str, x: Tensor) -> Scaled:
        """After PEFT's dropout of blocks; in the dtype of x, as PEFT."""
        turns = self.cayley_batch(self.boft_R[name][0])
        blocks = self.boft_dropout[name](turns[None])[0]
        return Scaled(block_diagonal(x, blocks.to(x.dtype)), self.boft_s[name].squeeze(-1))


TAKEOVERS = {Linear: linear(FusedBoft)}
