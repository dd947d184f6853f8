"""RoAd (Liao and Monz, 2024, arXiv 2409.00119): pairs of y turned and scaled."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.road.layer import Linear, _prepare_cols
from torch import Tensor

from ...ops.turned_pairs import turned_pairs
from .base import FusedTuner, base_of, linear


class FusedRoad(FusedTuner, Linear):
    """y = R (W x + b), R of one 2 × 2 matrix for each pair; several adapters one after the other."""

    per_adapter = "road_theta"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """What each of a pair is multiplied by, and the other one for it."""
        theta, alpha = self.road_theta[name], self.road_alpha[name]
        return _prepare_cols(self.variant[name], self.group_size[name], theta, alpha)  # type: ignore[no-any-return]

    def computed(self: Any, names: list[str], x: Tensor, read: dict[str, Any]) -> Tensor:
        """In the dtype of the adapter, as PEFT."""
        y = F.linear(x, *base_of(self))
        dtype = y.dtype
        for name in names:
            diagonal, beside = self.update(name, x)
            y = turned_pairs(y.to(diagonal.dtype), diagonal, beside, self.group_size[name])
        return y.to(dtype)


TAKEOVERS = {Linear: linear(FusedRoad)}
