"""Asymmetry: A random with orthonormal rows, and frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, check_rank, register
from .random import zero_b

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("asym", options=("train_a",))
def draw_asym(site: Site) -> Drawn:
    """A Aᵀ = I at random and frozen, B = 0

    Asymmetry in Low-Rank Adapters (Zhu et al., 2024, arXiv 2402.16842): training B alone, under a random A,
    loses little. ``method_options={"train_a": True}`` lets A train.
    """
    r = check_rank(site, site.in_features)
    q, _ = torch.linalg.qr(torch.randn(site.in_features, r))
    frozen = frozenset() if site.option("train_a", False, (True, False)) else frozenset({"lora_A"})
    return Drawn(q.T.contiguous(), zero_b(site), frozen=frozen)
