"""LORPMAN: one update for each task, mixed by a preference that is given with the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("lorpman")
class LORPMAN(Adapter):
    """ΔW(p) = (α/r) · Σ_i p_i B_i A_i

    LORPMAN (2024, arXiv 2407.20734), a manifold of trade-offs between tasks. ``lora_A [tasks · r, in]`` and
    ``lora_B [out, tasks · r]`` train, and in the paper's first phase W too (let it: the method trains what
    requires gradients). ``call["preference"]`` is p ``[tasks]``, or ``[samples, tasks]``, one for each of the
    first dimension of x. ``method_options={"tasks": m}`` (2). The penalty that keeps the tasks apart is
    ``compose.orthogonal_penalty``. The paper's sizes and defaults were not at hand.
    """

    options = frozenset({"tasks"})
    plain = False
    reads_x = True
    mergeable = False

    def build(self, site: Site) -> Start:
        """A Kaiming-uniform A, and a B of zeros."""
        self.tasks = site.whole_option("tasks", 2)
        ranks = self.tasks * self.r
        zero = site.config.init_lora_weights is not False
        make = site.zeros if zero else site.kaiming
        return Start(
            {"lora_A": site.kaiming(ranks, site.in_features), "lora_B": make(site.out_features, ranks)}
        )

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The preference as a gate on the ranks."""
        assert x is not None and call is not None
        p: Tensor = call["preference"].to(self.lora_A.dtype)
        if p.shape[-1] != self.tasks or p.dim() > x.dim():
            raise ValueError(f"preference: lorpman expects [..., {self.tasks}], got {tuple(p.shape)}")
        gate = torch.repeat_interleave(p, self.r, -1)
        if gate.dim() > 1:
            gate = gate.reshape(*gate.shape[:-1], *[1] * (x.dim() - gate.dim()), -1)
            gate = gate.expand(*x.shape[:-1], -1)
        return LowRank(self.lora_A, self.lora_B, self.scaling, gate)
