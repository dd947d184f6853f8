"""MTLoRA (matrix transformation): a small matrix of a chosen structure between A and B."""

from __future__ import annotations

from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("mt_lora")
class MTLoRA(LoRA):
    """ΔW = (α/r) · B T A, T = C, C Cᵀ, C D or C + D

    Matrix-Transformation LoRA (Liang et al., 2024, arXiv 2403.07440). C and D ``[r, r]`` train with A and B
    and start as A does. ``method_options={"structure": …}`` chooses T: ``"shim"`` C, ``"icfm"`` C Cᵀ,
    ``"ctcm"`` C D, ``"dtsm"`` C + D. Each linear has a T of its own, also of a group that shares x.
    """

    options = frozenset({"structure"})
    peft = False

    def build(self, site: Site) -> Start:
        """LoRA's A and B, C, and D where the structure has one."""
        self.structure = site.option("structure", "shim", ("shim", "icfm", "ctcm", "dtsm"))
        names = ("lora_C", "lora_D") if self.structure in ("ctcm", "dtsm") else ("lora_C",)
        cores = {name: site.kaiming(self.r, self.r) for name in names}
        return Start({**super().build(site).tensors, **cores})

    def transformation(self) -> Tensor:
        """T ``[r, r]``."""
        c = self.lora_C
        if self.structure == "shim":
            return c
        if self.structure == "icfm":
            return c @ c.T
        return c @ self.lora_D if self.structure == "ctcm" else c + self.lora_D

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds T into A."""
        return LowRank(self.transformation() @ self.lora_A, self.lora_B, self.scaling)
