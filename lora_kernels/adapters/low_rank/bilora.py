"""BiLoRA's and AutoLoRA's structure: a pseudo singular value decomposition with values of its own kind."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank

_STD = 0.02
KINDS = ("real", "softmax", "sigmoid")


@register("bilora")
class BiLoRA(Adapter):
    """ΔW = (α/r) · B diag(λ) A, λ = e, softmax(e) or sigmoid(e)

    BiLoRA (Qin et al., 2024, arXiv 2403.13037): A ``[r, in]`` and B ``[out, r]`` train on one part of the
    data, e ``[r]`` on another: :class:`lora_kernels.schedules.BiLoRA`. AutoLoRA's search (Zhang et al., 2024,
    arXiv 2403.09113) has the same with softmax. The start is from memory: A and B of N(0, 0.02²), e = 0; but
    B = 0 where λ(0) is not. ``method_options={"values": "real"}``, ``"softmax"`` or ``"sigmoid"``.
    """

    options = frozenset({"values"})
    splits = {"lora_A": ("in", 1), "lora_B": ("out", 0)}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """A, B and e."""
        self.kind = site.option("values", "real", KINDS)
        lora_b = site.normal(site.out_features, self.r, std=_STD)
        if self.kind != "real" and site.config.init_lora_weights:
            lora_b = site.zeros(site.out_features, self.r)
        values = site.zeros(self.r) if site.config.init_lora_weights else site.normal(self.r)
        lora_a = site.normal(self.r, site.in_features, std=_STD)
        return Start({"lora_A": lora_a, "lora_B": lora_b, "values": values})

    def gate(self) -> Tensor:
        """λ."""
        if self.kind == "softmax":
            return self.values.softmax(0)
        return self.values.sigmoid() if self.kind == "sigmoid" else self.values

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A and B with λ between them."""
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.gate())
