"""LoRA-XS: a small core between frozen singular vectors of the base weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("lora_xs")
class LoRAXS(LoRA):
    """ΔW = (α/r) · B R A with W ≈ U_r S_r V_rᵀ, B = U_r, A = S_r V_rᵀ

    LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604). Only the core R ``[r, r]`` trains; it starts at
    N(0, 10⁻¹⁰), so ΔW starts near zero and not at it. W itself is not changed. Without a base weight,
    or with ``init_lora_weights=False``, the frozen A and B are random.

    Raises:
        ValueError: r exceeds the smaller side of the weight.
    """

    frozen = frozenset({"lora_A", "lora_B"})
    zero_start = False
    peft = False

    def build(self, site: Site) -> Start:
        """A and B from the singular value decomposition of the weight, and a small core."""
        smaller = min(site.in_features, site.out_features)
        if self.r > smaller:
            raise ValueError(f"r: lora_xs expects at most min(in, out) = {smaller}, got {self.r}")
        core, weight = site.normal(self.r, self.r, std=1e-5), site.weight
        if weight is None or self.init_lora_weights is False:
            lora_a, lora_b = site.kaiming(self.r, site.in_features), site.kaiming(site.out_features, self.r)
        else:
            wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            u, s, vh = torch.linalg.svd(wide, full_matrices=False)
            lora_a, lora_b = s[: self.r, None] * vh[: self.r], u[:, : self.r]
        return Start({"lora_A": lora_a, "lora_B": lora_b, "lora_R": core})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds the core into B, so that A has no gradient and x need not be saved."""
        return LowRank(self.lora_A, self.lora_B @ self.lora_R, self.scaling)
