"""LoRA and rsLoRA."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Adapter, register
from .call import Call
from .site import Site, Start
from .update import LowRank


@register("lora")
class LoRA(Adapter):
    """ΔW = (α/r) · B A

    LoRA (Hu et al., 2021, arXiv 2106.09685); with ``use_rslora`` the scale is α/√r (Kalajdzievski, 2023,
    arXiv 2312.03732). A ``[r, in]`` and B ``[out, r]`` train; B starts at zero. With
    ``init_lora_weights="gaussian"`` A is normal, with ``False`` both are random.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    peft = True
    splits = {"lora_A": ("in", 1), "lora_B": ("out", 0)}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """Random A and zero B, or both random."""
        if self.init_lora_weights == "gaussian":
            lora_a = site.normal(self.r, site.in_features, std=1 / self.r)
        else:
            lora_a = site.kaiming(self.r, site.in_features)
        shape = (site.out_features, self.r)
        lora_b = site.kaiming(*shape) if self.init_lora_weights is False else site.zeros(*shape)
        return Start({"lora_A": lora_a, "lora_B": lora_b})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A, B and the scale."""
        return LowRank(self.lora_A, self.lora_B, self.scaling)
