"""MTLoRA (matrix transformation): a small matrix of a chosen structure between A and B."""

from __future__ import annotations

from torch import Tensor

from ..base import register
from ..call import Call
from ..layer_kinds.merged_linear import enabled_parts, spread_parts
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("mt_lora")
class MTLoRA(LoRA):
    """ΔW = (α/r) · B T A, T = C, C Cᵀ, C D or C + D

    Matrix-Transformation LoRA (Liang et al., 2024, arXiv 2403.07440). C and D ``[r, r]`` train with A and B
    and start as A does. ``method_options={"structure": …}`` chooses T: ``"shim"`` C, ``"icfm"`` C Cᵀ,
    ``"ctcm"`` C D, ``"dtsm"`` C + D. Each linear has a T of its own, also of a group that shares x.
    With ``enable_lora`` the linear is several in one, as in ``merged_linear``: A ``[m·r, in]`` and B
    ``[m·out/n, r]`` of its m enabled parts are ``merged_A`` and ``merged_B``, and C and D ``[m·r, m·r]`` mix
    their ranks.
    """

    options = frozenset({"structure", "enable_lora"})
    peft = False
    enabled: tuple[bool, ...] = ()

    def build(self, site: Site) -> Start:
        """LoRA's A and B, C, and D where the structure has one."""
        self.structure = site.option("structure", "shim", ("shim", "icfm", "ctcm", "dtsm"))
        merged = "enable_lora" in site.config.method_options
        factors = self._merged(site) if merged else super().build(site).tensors
        r = next(iter(factors.values())).shape[0]
        names = ("lora_C", "lora_D") if self.structure in ("ctcm", "dtsm") else ("lora_C",)
        return Start({**factors, **{name: site.kaiming(r, r) for name in names}})

    def _merged(self, site: Site) -> dict[str, Tensor]:
        self.enabled = enabled_parts(site, (True,))
        self.splits = {}  # type: ignore[misc]
        m, rows = sum(self.enabled), site.out_features // len(self.enabled)
        lora_a = site.kaiming(m * self.r, site.in_features)
        return {"merged_A": lora_a, "merged_B": site.zeros(m * rows, self.r)}

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
        if self.enabled:
            lora_b = spread_parts(self.merged_B, self.enabled)
            return LowRank(self.transformation() @ self.merged_A, lora_b, self.scaling)
        return LowRank(self.transformation() @ self.lora_A, self.lora_B, self.scaling)
