"""LaMDA: a trained core, A frozen, B frozen column by column."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("lamda")
class LaMDA(LoRA):
    """ΔW = (α/r) · B S A with A frozen

    LaMDA (Azizi et al., 2024, arXiv 2406.12832). The core S ``[r, r]`` trains; B does until
    :class:`lora_kernels.schedules.LaMDAFreezer` has frozen it. The backward pass reads h = x Aᵀ, and x is
    not saved. ``method_options={"start": …}``: ``"random"`` (the authors' program: A and S Kaiming-uniform,
    B = 0) or ``"svd"`` (A and B the leading singular vectors of W, as the paper has them; how it starts S is
    not known: S = 0 here). LaMDA++'s ranks: :func:`lora_kernels.stats.energy_ranks`.
    """

    options = frozenset({"start"})
    frozen = frozenset({"lora_A"})
    peft = False

    def build(self, site: Site) -> Start:
        """A, B and the core."""
        if site.option("start", "random", ("random", "svd")) == "random":
            return Start({**super().build(site).tensors, "core": site.kaiming(self.r, self.r)})
        smaller = min(site.in_features, site.out_features)
        if self.r > smaller or site.weight is None:
            got = f"{self.r} of {smaller}" if site.weight is not None else "none"
            raise ValueError(f"start: lamda's 'svd' expects a weight with r singular vectors, got {got}")
        wide = site.weight.detach().to(torch.promote_types(site.weight.dtype, torch.float32))
        u, _, vh = torch.linalg.svd(wide, full_matrices=False)
        core = site.zeros(self.r, self.r) if self.init_lora_weights else site.kaiming(self.r, self.r)
        return Start({"lora_A": vh[: self.r], "lora_B": u[:, : self.r], "core": core})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds S into B, so that A has no gradient."""
        return LowRank(self.lora_A, self.lora_B @ self.core, self.scaling)
