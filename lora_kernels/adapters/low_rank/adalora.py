"""AdaLoRA: a pseudo singular value decomposition whose values can be taken away."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank

_STD = 0.02


@register("adalora")
class AdaLoRA(Adapter):
    """ΔW = α / (r + 10⁻⁵) · B diag(E) A

    AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) with PEFT's numbers: A ``[r, in]`` and B ``[out, r]`` of
    N(0, 0.02²), E ``[r, 1]`` from 0. :class:`lora_kernels.schedules.AdaLoRA` zeroes values; r in the scale
    stays the first one.
    """

    frozen = frozenset({"ranknum"})
    splits = {"lora_A": ("in", 1), "lora_B": ("out", 0)}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """A, B, E and r as a number that is saved."""
        values = site.zeros(self.r, 1) if site.config.init_lora_weights else site.normal(self.r, 1)
        return Start(
            {
                "lora_A": site.normal(self.r, site.in_features, std=_STD),
                "lora_B": site.normal(site.out_features, self.r, std=_STD),
                "lora_E": values,
                "ranknum": site.zeros(1).fill_(self.r),
            }
        )

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """E and the scale in the gate."""
        return LowRank(
            self.lora_A, self.lora_B, 1.0, self.lora_E[:, 0] * (self.lora_alpha / (self.ranknum + 1e-5))
        )
