"""AdvLoRA's structure: LoRA with a scale that trains."""

from __future__ import annotations

from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("advlora")
class AdvLoRA(LoRA):
    """ΔW = (α/r) · a · B A

    AdvLoRA (Ji et al., 2024, arXiv 2404.13425) as rebuilt from its abstract, not from its text. What trains
    are A ``[r, in]``, B ``[out, r]`` and a ``[1]`` (its "adaptive parameter update"), 1 at the start.
    ``init_lora_weights="clusters"`` is its start, and :func:`lora_kernels.schedules.advlora_loss` what it
    trains with.
    """

    any_start = True
    peft = False  # which knows no a

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and a = 1."""
        start = super().build(site)
        return Start({**start.tensors, "scale": site.zeros(1) + 1}, start.weight)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A, B and the whole scale."""
        return LowRank(self.lora_A, self.lora_B, self.scaling * self.scale)
