"""SoRA: a gate on the rank that a proximal step drives to zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, Factors, register
from .config import LoRAConfig
from .lora import LoRA


@register("sora")
class SoRA(Adapter):
    """ΔW = (α/r) · (B ⊙ g) A

    SoRA (Ding et al., 2023, arXiv 2311.11696). A, B and the gate g ``[r]`` train; g starts at N(0, 1).
    Call :meth:`prox_` after each optimiser step and :meth:`compact` once training is done.
    """

    def build(self, config: LoRAConfig, **where: Any) -> None:
        """Creates A, B and the gate."""
        super().build(config, **where)
        self.gate = nn.Parameter(torch.empty(self.r, **where))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """LoRA's A and B, and a normal gate."""
        super().reset_parameters(weight)
        nn.init.normal_(self.gate)

    def lower(self) -> Factors:
        """A and B with the gate between them."""
        return Factors(self.lora_A, self.lora_B, self.scaling, self.gate)

    @torch.no_grad()
    def prox_(self, xi: float) -> None:
        """g ← sign(g) · max(|g| - ξ, 0), the proximal step of ξ·‖g‖₁ (ξ = learning rate · λ)."""
        if xi < 0:
            raise ValueError(f"xi: expected at least 0, got {xi}")
        self.gate.copy_(torch.nn.functional.softshrink(self.gate, xi))

    @torch.no_grad()
    def compact(self) -> LoRA:
        """The LoRA of the same ΔW that holds only the ranks with g ≠ 0 (at least one), g absorbed in A."""
        kept = self.gate.nonzero().flatten()
        kept = kept if kept.numel() else kept.new_zeros(1)
        r = kept.numel()
        config = LoRAConfig(r=r, lora_alpha=self.scaling * r, lora_dropout=self.lora_dropout)
        device, dtype = self.lora_A.device, self.lora_A.dtype
        small = LoRA(self.in_features, self.out_features, config, device=device, dtype=dtype)
        small.lora_A.copy_(self.lora_A[kept] * self.gate[kept, None])
        small.lora_B.copy_(self.lora_B[:, kept])
        return small
