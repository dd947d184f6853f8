"""QA-LoRA: a branch that sees groups of inputs, as a quantised base of such groups can take it in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import LowRank

_POOLS = ("sum", "mean", "peft")


@register("qalora")
class QALoRA(Adapter):
    """ΔW = (α/r) · c · B A, each column of A standing for L inputs: pool(x) Aᵀ Bᵀ, pool the sum of a group

    QA-LoRA (Xu et al., 2023, arXiv 2309.14717). ``lora_A`` ``[r, in/L]`` starts Xavier-uniform, B
    ``[out, r]`` at 0; both train. Options: ``group_size`` L, which divides in (32; of PEFT 16), and ``pool``:
    "sum" (c = 1), "mean" (c = 1/L) or "peft" (c = in/L², PEFT's ``use_qalora``, whose files these are). ΔW is
    constant in a group, so :class:`lora_kernels.nn.OffsetLinear`, an int4 base, takes it in exactly.
    """

    options = frozenset({"group_size", "pool"})
    peft_form = PeftForm(
        "LORA",
        options={"qalora_group_size": "group_size"},
        constants={"use_qalora": True},
        implied={"pool": "peft"},
    )

    def build(self, site: Site) -> Start:
        """Its A and B."""
        pool = site.option("pool", "sum", _POOLS)
        self.group = site.whole_option("group_size", 16 if pool == "peft" else 32)
        site.must_divide("group_size", self.group, "in_features")
        factor = {"sum": 1.0, "mean": 1 / self.group, "peft": site.in_features / self.group**2}[pool]
        self.scaling *= factor
        lora_a = torch.nn.init.xavier_uniform_(site.empty(self.r, site.in_features // self.group))
        return Start({"lora_A": lora_a, "lora_B": site.zeros(site.out_features, self.r)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A with each column L times: the fused kernels then read x once, and drop its own elements."""
        return LowRank(self.lora_A.repeat_interleave(self.group, 1), self.lora_B, self.scaling)

    def by_group(self) -> Tensor:
        """ΔW of each group, ``[out, in/L]``."""
        return self.scaling * (self.lora_B @ self.lora_A)
