"""ALoRA's structure: LoRA whose ranks are switched on and off."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("alora_alloc")
class ALoRA(LoRA):
    """ΔW = (α/r) · B diag(g) A, g ∈ {0, 1}ʳ

    ALoRA (Liu et al., 2024, arXiv 2403.16187). A ``[r, in]`` and B ``[out, r]`` train; g, ``alive``, does
    not: :class:`lora_kernels.schedules.ALoRAAllocator` moves ranks from layer to layer, and r is the most
    that a layer can get. ``method_options={"active": n}`` are on at the start (half of them); s stays.
    """

    options = frozenset({"active"})
    peft = False

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and the first ranks on."""
        active = min(self.r, site.whole_option("active", max(1, self.r // 2)))
        alive = torch.arange(self.r, device=site.device) < active
        return Start({**super().build(site).tensors, "alive": alive})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A and B with the switches between them."""
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.alive.to(self.lora_A.dtype))
