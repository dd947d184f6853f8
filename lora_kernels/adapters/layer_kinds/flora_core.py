"""FLoRA: a small core between one factor for each dimension of the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("flora_core")
class FLoRACore(Adapter):
    """ΔW = α · G ×₁ U_1 … ×_N U_N, of a linear α · U_2 Gᵀ U_1ᵀ

    FLoRA (Si et al., 2024, arXiv 2405.14739): a Tucker decomposition over the dimensions of W, in the order
    in, out and the sizes of a convolution's kernel. The core G ``[r_1, …, r_N]`` starts at 0 and the
    U_k ``[n_k, r_k]`` at N(0, 1/(2 r_k)); all train, Π r_k + Σ n_k r_k numbers. The scale is ``lora_alpha``
    itself (4 in the paper), whatever the rank. ``method_options={"ranks": [...]}`` gives each r_k; by default
    it is r, or n_k where that is smaller. The branch costs what LoRA of rank r_2 does.
    """

    options = frozenset({"ranks"})

    def scaling_at(self, rank: int) -> float:
        """α."""
        return float(self.lora_alpha)

    def build(self, site: Site) -> Start:
        """A core of zeros, and normal factors."""
        sizes = (site.in_features // math.prod(site.kernel), site.out_features, *site.kernel)
        ranks = tuple(site.option("ranks", [min(self.r, size) for size in sizes]))
        if len(ranks) != len(sizes) or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise ValueError(
                f"method_options: ranks: expected {len(sizes)}, one of at least 1 for each dimension of W,"
                f" got {ranks}"
            )
        factors = {
            f"U_{k}": site.normal(size, rank, std=math.sqrt(0.5 / rank))
            for k, (size, rank) in enumerate(zip(sizes, ranks, strict=True), 1)
        }
        return Start({"core": site.zeros(*ranks), **factors})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Folds all but U_2 into A."""
        whole = self.core
        for k in range(len(self.kernel)):
            whole = torch.tensordot(whole, getattr(self, f"U_{k + 3}"), dims=([2], [1]))
        lora_a = torch.tensordot(whole, self.U_1, dims=([0], [1])).movedim(-1, 1)
        return LowRank(lora_a.flatten(1), self.U_2, self.scaling)
