"""IR-QLoRA's adapter: what A and B take in is also passed on as it is, averaged and repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("ir_qlora")
class IRQLoRA(LoRA):
    """ΔW = (α/r) · (B + β₂ R)(A + β₁ P), P the mean over each in/r inputs, R each rank out/r times

    IR-QLoRA (Qin et al., 2024, arXiv 2402.05445), its information elastic connection; the quantised base that
    goes with it is :func:`lora_kernels.quant.icq_quantize`. A, B and the scalars β, which start at 0, train.
    r divides in and out. The paper's branch drops A's input and not P's; here dropout is on both.
    """

    peft = False
    splits = {}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and two zeros."""
        site.must_divide("r", self.r, "in_features", "out_features")
        return Start({**super().build(site).tensors, "beta_1": site.zeros(1), "beta_2": site.zeros(1)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Both sums, r (in + out) numbers."""
        eye = torch.eye(self.r, device=self.lora_A.device, dtype=self.lora_A.dtype)
        wide, tall = self.in_features // self.r, self.out_features // self.r
        lora_a = self.lora_A + (self.beta_1 / wide * eye).repeat_interleave(wide, 1)
        lora_b = self.lora_B + (self.beta_2 * eye).repeat_interleave(tall, 0)
        return LowRank(lora_a, lora_b, self.scaling)
