"""MoSLoRA: a trained mixer between the two projections."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("moslora")
class MoSLoRA(LoRA):
    """ΔW = (α/r) · B M A

    MoSLoRA (Wu et al., 2024, arXiv 2406.11909). A ``[r, in]``, the mixer M ``[r, r]`` and B train.
    ``method_options={"mixer": …}`` says how M starts: ``"kaiming"``, ``"orthogonal"`` or ``"eye"``.
    """

    options = frozenset({"mixer"})
    peft = False  # LoRA's is True, and PEFT knows no M

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and the mixer."""
        mixer = site.kaiming(self.r, self.r)
        how = site.option("mixer", "kaiming", ("kaiming", "orthogonal", "eye"))
        if how == "orthogonal":
            torch.nn.init.orthogonal_(mixer)
        elif how == "eye":
            torch.nn.init.eye_(mixer)
        return Start({**super().build(site).tensors, "mixer": mixer})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds M into A: r²·in operations, and none of the rows of x."""
        return LowRank(self.mixer @ self.lora_A, self.lora_B, self.scaling)
