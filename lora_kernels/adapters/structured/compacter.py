"""Compacter's parametrisation as the update of a linear; its bottleneck is ``nn.CompacterAdapter``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("compacter")
class Compacter(Adapter):
    """ΔWᵀ = Σ_i R_i ⊗ (L_i T_i), i < n

    Compacter (Karimi Mahabadi et al., 2021, arXiv 2106.04647), as a hypercomplex update beside a linear. The
    rules R ``[n, n, n]`` are one tensor for all layers; L ``[n, in/n, k]`` and T ``[n, k, out/n]`` are the
    layer's. ``method_options``: ``n`` (4) and ``rank``, k (1); no scale, r and α are not used. The rules
    start at N(0, 10⁻⁸), so that ΔW starts near zero and not at it.

    Neither ΔW nor a Kronecker product is made: it is of rank n² k, with A[(i, a), (a, p)] = L_i[p] and
    B[(b, q), (i, a)] = R_i[a, b] T_i[q], and runs on the kernels of LoRA.

    Raises:
        ValueError: n does not divide both sizes.
    """

    options = frozenset({"n", "rank"})
    zero_start = False
    rule: Tensor
    left: Tensor
    right: Tensor

    def build(self, site: Site) -> Start:
        """The layer's factors, and the rules that all layers share."""
        n, k = site.whole_option("n", 4), site.whole_option("rank", 1)
        site.must_divide("n", n, "in_features", "out_features")
        left, right = site.empty(n, site.in_features // n, k), site.empty(n, k, site.out_features // n)
        for factor in (*left, *right):
            torch.nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
        rule = site.shared(("compacter", n), lambda: site.normal(n, n, n, std=1e-4))
        return Start({"rule": rule, "left": left, "right": right})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """A and B of rank n² k, of the layer's few numbers."""
        n, _, k = self.left.shape
        eye = torch.eye(n, dtype=self.left.dtype, device=self.left.device)
        lora_a = torch.einsum("ac,ipk->iakcp", eye, self.left).reshape(n * n * k, self.in_features)
        lora_b = torch.einsum("iab,ikq->bqiak", self.rule, self.right).reshape(self.out_features, n * n * k)
        return LowRank(lora_a, lora_b)
