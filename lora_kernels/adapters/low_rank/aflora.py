"""AFLoRA: trained scales of the ranks and the outputs around an A and a B that freeze."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("aflora")
class AFLoRA(Adapter):
    """ΔW = (α/r) · diag(b) B diag(d) A

    AFLoRA (Liu et al., 2024, arXiv 2403.13269), which has no α/r: ``lora_alpha = r``. The scales d ``[r]``
    (from 0.1) and b ``[out]`` (from 0) always train; A ``[r, in]`` and B ``[out, r]``, Kaiming-uniform, do
    where ``in ≠ out``, until :class:`lora_kernels.schedules.AFLoRAFreezer` freezes them.
    ``method_options={"train_square": True}`` trains those of square layers too.
    """

    options = frozenset({"train_square"})
    splits = {"lora_A": ("in", 1), "lora_B": ("out", 0), "out_scale": ("out", 0)}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """A, B and the two scales."""
        square = site.in_features == site.out_features
        if square and not site.option("train_square", False, (False, True)):
            self.frozen = frozenset({"lora_A", "lora_B"})
        out_scale = site.zeros(site.out_features)
        tensors = {
            "lora_A": torch.nn.init.kaiming_uniform_(site.empty(self.r, site.in_features)),
            "lora_B": torch.nn.init.kaiming_uniform_(site.empty(site.out_features, self.r)),
            "rank_scale": torch.nn.init.constant_(site.empty(self.r), 0.1),
            "out_scale": out_scale if self.init_lora_weights else torch.nn.init.normal_(out_scale),
        }
        return Start(tensors)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """d as the gate on the ranks, b folded into B: where both freeze, x is not saved."""
        return LowRank(self.lora_A, self.out_scale[:, None] * self.lora_B, self.scaling, self.rank_scale)
