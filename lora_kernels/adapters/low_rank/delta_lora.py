"""Delta-LoRA: W follows the change of B A, as 2r ranks over a W that stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Adapter, make, register
from ..call import Call
from ..config import LoRAConfig
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("delta_lora")
class DeltaLoRA(LoRA):
    """ΔW = (α/r) · ((1+λ) B A - λ B_K A_K), with the gradients of (α/r) · B A

    Delta-LoRA (Zi et al., 2023, arXiv 2309.02411): W ← W + λ (α/r) (B⁺A⁺ - B A) with each step from the K-th
    on, summed up. λ is 0 until :class:`lora_kernels.schedules.DeltaLoRA` sets it, and A_K and B_K. W stays
    as it is, in any format. :meth:`to_lora` gives a LoRA of rank 2r.
    """

    peft = False
    frozen = frozenset({"anchor_A", "anchor_B", "lam"})

    def build(self, site: Site) -> Start:
        """LoRA's A and B, no anchors and λ = 0."""
        start = super().build(site)
        anchors = {
            "anchor_A": site.zeros(self.r, self.in_features),
            "anchor_B": site.zeros(self.out_features, self.r),
        }
        self.frozen = self.frozen | type(self).frozen
        return Start({**start.tensors, **anchors, "lam": site.zeros(1)}, start.weight)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """2r ranks; what W would have taken has no gradient."""
        fixed = self.lora_A.detach()
        # The value of A, and its gradient through a B that is (1+λ) times too large.
        lora_a = fixed + (self.lora_A - fixed) / (1 + self.lam)
        lora_b = self.lora_B + self.lam * self.lora_B.detach()
        pairs = (torch.cat([lora_a, self.anchor_A]), torch.cat([lora_b, -self.lam * self.anchor_B], 1))
        return LowRank(*pairs, self.scaling)

    @torch.no_grad()
    def to_lora(self) -> Adapter:
        """The plain LoRA of rank 2r of the same ΔW."""
        update = self.lower()
        config = LoRAConfig(r=2 * self.r, lora_alpha=self.scaling * 2 * self.r)
        like: Any = {"device": self.lora_A.device, "dtype": self.lora_A.dtype}
        plain = make(self.in_features, self.out_features, config, **like)
        plain.lora_A.copy_(update.lora_a)
        plain.lora_B.copy_(update.lora_b)
        return plain
