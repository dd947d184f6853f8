"""LoRA-XS: a small core between frozen singular vectors of the base weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, Factors, register
from .config import LoRAConfig


@register("lora_xs")
class LoRAXS(Adapter):
    """ΔW = (α/r) · B R A with W ≈ U_r S_r V_rᵀ, B = U_r, A = S_r V_rᵀ

    LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604). Only the core R ``[r, r]`` trains; it starts at
    N(0, 10⁻¹⁰), so ΔW starts near zero and not at it. W itself is not changed. Without a base weight,
    or with ``init_lora_weights=False``, the frozen A and B are random.

    Raises:
        ValueError: r exceeds the smaller side of the weight.
    """

    frozen = frozenset({"lora_A", "lora_B"})
    zero_start = False

    def build(self, config: LoRAConfig, **where: Any) -> None:
        """Creates A, B and the core."""
        smaller = min(self.in_features, self.out_features)
        if self.r > smaller:
            raise ValueError(f"r: lora_xs expects at most min(in, out) = {smaller}, got {self.r}")
        super().build(config, **where)
        self.lora_R = nn.Parameter(torch.empty(self.r, self.r, **where))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Takes A and B from the singular value decomposition of ``weight``."""
        nn.init.normal_(self.lora_R, std=1e-5)
        if weight is None or self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
            nn.init.kaiming_uniform_(self.lora_B, a=5**0.5)
            return
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        self.lora_A.copy_(s[: self.r, None] * vh[: self.r])
        self.lora_B.copy_(u[:, : self.r])

    def lower(self) -> Factors:
        """Folds the core into A: r²·in operations, and none of the rows of x."""
        return Factors(self.lora_R @ self.lora_A, self.lora_B, self.scaling)
