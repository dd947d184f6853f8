"""LoKr (LyCORIS, Yeh et al., 2023, arXiv 2309.14859): ΔW = s · C₁ ⊗ C₂."""

from __future__ import annotations

from typing import Any

from peft.tuners.lokr.layer import Linear
from torch import Tensor

from ...adapters.structured.lokr import kronecker
from ...adapters.update import Added
from .base import linear
from .lycoris import FusedLycoris


class FusedLoKr(FusedLycoris, Linear):
    """y = x Wᵀ + b + s · (x, as m rows, by C₂ and then by C₁): no ΔW is made."""

    def update(self: Any, name: str, x: Tensor) -> Added:
        """As our own LoKr; either factor may be a product itself."""
        c1, c2 = (self._factor(one, name) for one in ("lokr_w1", "lokr_w2"))
        y, keep = kronecker(x, c1, c2, self.scaling[name]), self.kept_rows(name)
        return Added(y if keep is None else y * keep.to(y.dtype))

    def _factor(self: Any, which: str, name: str) -> Tensor:
        whole = getattr(self, which)
        if name in whole:
            return whole[name]
        return getattr(self, f"{which}_a")[name] @ getattr(self, f"{which}_b")[name]


TAKEOVERS = {Linear: linear(FusedLoKr)}
