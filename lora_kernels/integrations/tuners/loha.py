"""LoHa (Hyeon-Woo et al., 2021, arXiv 2108.06098; LyCORIS, Yeh et al., 2023, arXiv 2309.14859)."""

from __future__ import annotations

from typing import Any

from peft.tuners.loha.layer import Linear
from torch import Tensor

from ...adapters.structured.loha import hadamard
from ...adapters.update import Formed, LowRank
from .base import linear
from .lycoris import FusedLycoris


class FusedLoHa(FusedLycoris, Linear):
    """y = x (W + s · (B₁ A₁) ⊙ (B₂ A₂))ᵀ + b: one product, of a weight that is made at each call."""

    def update(self: Any, name: str, x: Tensor) -> LowRank | Formed:
        """As our own LoHa; rank dropout takes rows of ΔW, which are those of B₁."""
        one = self.hada_w1_a[name]
        keep = self.kept_rows(name)
        factors = (one if keep is None else one * keep[:, None], self.hada_w1_b[name])
        return hadamard(*factors, self.hada_w2_a[name], self.hada_w2_b[name], _single(self.scaling[name]))


def _single(number: float) -> float:
    """``number`` with the 24 bits of the float32 that PEFT makes of this scale."""
    big = number * (2.0**29 + 1)
    return big - (big - number)


TAKEOVERS = {Linear: linear(FusedLoHa)}
