"""Asymmetry: one factor fixed, orthonormal and not zero, the other learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Drawn, check_rank, given_weight, register
from .random import empty, kaiming, zero_b

if TYPE_CHECKING:
    from ..adapters.site import Site

_WAYS = ("orthonormal", "kaiming", "leading", "trailing")


@register("asym", options=("train_a", "freeze", "directions"))
def draw_asym(site: Site) -> Drawn:
    """A Aᵀ = I at random and frozen, B = 0

    Asymmetry in Low-Rank Adapters (Zhu et al., 2024, arXiv 2402.16842): training B alone, under a random A,
    loses little, and less than training A under a random B. ``method_options``: ``train_a`` (False) lets A
    train too; ``freeze="B"`` fixes B, BᵀB = I, and A = 0 trains; ``directions`` of the fixed factor:
    ``"orthonormal"`` at random, ``"kaiming"``, or W's ``"leading"`` or ``"trailing"`` singular vectors (right
    ones for A; the authors' program takes other rows of the decomposition for them).
    """
    of_a = site.option("freeze", "A", ("A", "B")) == "A"
    fixed = _directions(site, of_a)
    if not of_a:
        lora_a = torch.nn.init.zeros_(empty(site, site.config.r, site.in_features))
        return Drawn(lora_a, fixed.T.contiguous(), frozen=frozenset({"lora_B"}))
    frozen = frozenset() if site.option("train_a", False, (True, False)) else frozenset({"lora_A"})
    return Drawn(fixed, zero_b(site), frozen=frozen)


def _directions(site: Site, of_a: bool) -> Tensor:
    """The fixed factor's rows ``[r, in]`` or, of B, columns ``[r, out]``."""
    way = site.option("directions", "orthonormal", _WAYS)
    size = site.in_features if of_a else site.out_features
    if way == "kaiming":
        return kaiming(site, site.config.r, size)
    if way == "orthonormal":
        r = check_rank(site, size)
        return torch.linalg.qr(torch.randn(size, r))[0].T.contiguous()
    r = check_rank(site)
    u, _, vh = torch.linalg.svd(given_weight(site), full_matrices=False)
    rows = vh if of_a else u.T
    return (rows[:r] if way == "leading" else rows[-r:]).contiguous()
