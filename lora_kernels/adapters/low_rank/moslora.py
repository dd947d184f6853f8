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
    ``method_options={"mixer": …}`` says how M starts: ``"kaiming"``, ``"orthogonal"`` or ``"eye"``. With
    ``"eye"`` and ``init_lora_weights="asym"`` it is the form of Asymmetry in Low-Rank Adapters (Zhu et al.,
    2024, arXiv 2402.16842) that has an E in the middle; any start does that leaves W as it is.
    """

    options = frozenset({"mixer"})
    any_start = True
    peft = False  # LoRA's is True, and PEFT knows no M

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and the mixer."""
        mixer = site.kaiming(self.r, self.r)
        how = site.option("mixer", "kaiming", ("kaiming", "orthogonal", "eye"))
        if how == "orthogonal":
            torch.nn.init.orthogonal_(mixer)
        elif how == "eye":
            torch.nn.init.eye_(mixer)
        start = super().build(site)
        if start.weight is not None:
            got = site.config.init_lora_weights
            raise ValueError(
                f"init_lora_weights: moslora expects a start that leaves W as it is, got {got!r}"
            )
        return Start({**start.tensors, "mixer": mixer})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds M into A, or into B where A is frozen, for which x is then not saved."""
        if "lora_A" in self.frozen:
            return LowRank(self.lora_A, self.lora_B @ self.mixer, self.scaling)
        return LowRank(self.mixer @ self.lora_A, self.lora_B, self.scaling)
