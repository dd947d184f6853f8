"""SoRA: a gate on the rank that a proximal step drives to zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("sora")
class SoRA(LoRA):
    """ΔW = (α/r) · (B ⊙ g) A

    SoRA (Ding et al., 2023, arXiv 2311.11696). A, B and the gate g ``[r]`` train; g starts at N(0, 1).
    Call :meth:`prox_` after each optimiser step and :meth:`compact` once training is done.
    """

    peft = False

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and a normal gate."""
        return Start({**super().build(site).tensors, "gate": site.normal(self.r)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A and B with the gate between them."""
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.gate)

    @torch.no_grad()
    def prox_(self, xi: float) -> None:
        """g ← sign(g) · max(|g| - ξ, 0), the proximal step of ξ·‖g‖₁ (ξ = learning rate · λ)."""
        if xi < 0:
            raise ValueError(f"xi: expected at least 0, got {xi}")
        self.gate.copy_(torch.nn.functional.softshrink(self.gate, xi))

    @torch.no_grad()
    def compact(self) -> Adapter:
        """The LoRA of the same ΔW that holds only the ranks with g ≠ 0 (at least one), g absorbed in A."""
        kept = self.gate.nonzero().flatten()
        kept = kept if kept.numel() else kept.new_zeros(1)
        return self.as_lora(self.lora_A[kept] * self.gate[kept, None], self.lora_B[:, kept])
