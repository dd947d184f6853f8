"""LoRETTA_rep: both factors are tensor trains."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank
from .tensor_train import contract, draw_train, train_shape


@register("loretta_rep")
class LoRETTARep(Adapter):
    """ΔW = (α/r) · B A with A = TT(G)ᵀ of a ``[in, r]`` and B = TT(G')ᵀ of a ``[r, out]``

    LoRETTA_rep (Yang et al., 2024, arXiv 2402.11417). The cores ``a_k`` and ``b_k``
    ``[R_{k-1}, n_k, R_k]`` train: Σ_k R_{k-1} n_k R_k numbers a factor. Options: ``tensor_rank`` R (5),
    ``shape_a`` and ``shape_b``, the n_k, of product in·r and r·out, and ``zero_init`` (True): the last core
    of B is 0, so that ΔW starts at 0. The released program starts with entries of A and B of deviation
    √(1/(in+r)) and √(1/(r+out)) instead, ``zero_init=False``. It also trains every LayerNorm and the head:
    name these in ``modules_to_save``.
    """

    options = frozenset({"tensor_rank", "shape_a", "shape_b", "zero_init"})

    def build(self, site: Site) -> Start:
        """The cores."""
        inner = site.whole_option("tensor_rank", 5)
        shape_a = train_shape(site, "shape_a", site.in_features, self.r)
        shape_b = train_shape(site, "shape_b", site.out_features, self.r)
        cores_a = draw_train(site, shape_a, inner, math.sqrt(1 / (site.in_features + self.r)))
        cores_b = draw_train(site, shape_b, inner, math.sqrt(1 / (self.r + site.out_features)))
        if site.option("zero_init", True, (True, False)):
            cores_b[-1].zero_()
        self.lengths = (len(cores_a), len(cores_b))
        named = {f"a_{k}": core for k, core in enumerate(cores_a)}
        return Start({**named, **{f"b_{k}": core for k, core in enumerate(cores_b)}})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Contracts the trains: r (in + out) numbers, as LoRA's."""
        lora_a, lora_b = self.contracted()
        return LowRank(lora_a, lora_b, self.scaling)

    def contracted(self) -> tuple[Tensor, Tensor]:
        """A ``[r, in]`` and B ``[out, r]``."""
        first, second = (
            [self._core(name, k) for k in range(n)] for name, n in zip("ab", self.lengths, strict=True)
        )
        return contract(first).view(-1, self.r).T, contract(second).view(self.r, -1).T

    def _core(self, factor: str, k: int) -> Any:
        return getattr(self, f"{factor}_{k}")
