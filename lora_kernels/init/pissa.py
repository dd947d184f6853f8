"""PiSSA: the principal singular vectors of W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, balanced, check_rank, given_weight, register, scaling_of

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("pissa", takes=True)
def draw_pissa(site: Site) -> Drawn:
    """W = U S Vᵀ, A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s), W_res = W - s · B A

    PiSSA (Meng et al., 2024, arXiv 2404.02948).
    """
    r = check_rank(site)
    u, s, vh = torch.linalg.svd(given_weight(site), full_matrices=False)
    return Drawn(*balanced(u[:, :r], s[:r], vh[:r], scaling_of(site)))


@register("_niter", takes=True)
def draw_pissa_niter(site: Site) -> Drawn:
    """PiSSA by a randomised decomposition with N rounds of subspace iteration: ``pissa_niter_N``."""
    rounds = int(str(site.config.init_lora_weights).rpartition("_")[2])
    u, s, v = torch.svd_lowrank(given_weight(site), check_rank(site), niter=rounds)
    return Drawn(*balanced(u, s, v.T, scaling_of(site)))
