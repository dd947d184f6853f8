"""HRA (Yuan et al., 2024, arXiv 2405.17484): W times r Householder reflections, which is of rank r."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.hra.layer import HRALinear
from torch import Tensor

from ...adapters.update import LowRank
from .base import GroupedTuner, base_of, linear


class FusedHra(GroupedTuner, HRALinear):
    """y = x (W H)ᵀ + b, H = Π_i (I - 2 u_i u_iᵀ) = I - U T Uᵀ: A = Uᵀ and B = -W U T

    T⁻¹ is half of the identity and what UᵀU has above the diagonal. PEFT multiplies W by H, which it makes of
    r products of in by in.
    """

    per_adapter = "hra_u"

    def why_not_adapter(self: Any, name: str) -> str | None:
        """Several adapters are a product, and reflections made orthogonal may be of parallel vectors."""
        if sum(one in self.hra_u for one in self.active_adapters) > 1:
            return "its active adapters multiply each other"
        return f"adapter {name!r} has apply_GS" if self.hra_apply_GS[name] else None

    def update(self: Any, name: str, x: Tensor) -> LowRank:
        """In float32 at least, since the solver knows no half precision."""
        weight, u = base_of(self)[0], self.hra_u[name]
        wide = torch.promote_types(u.dtype, torch.float32)
        u = u.to(wide)
        u = u / u.norm(dim=0)
        inverse = torch.triu(u.T @ u, 1) + 0.5 * torch.eye(u.shape[1], device=u.device, dtype=wide)
        product = weight.to(wide) @ u
        lora_b = torch.linalg.solve_triangular(inverse, product, upper=True, left=False)
        return LowRank(u.T, lora_b, -1.0)


TAKEOVERS = {HRALinear: linear(FusedHra)}
