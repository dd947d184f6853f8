"""MiLoRA: the minor singular vectors of W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, balanced, check_rank, given_weight, register, scaling_of

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("milora", takes=True)
def draw_milora(site: Site) -> Drawn:
    """W = U S Vᵀ, A = √(S_m/s) V_mᵀ, B = U_m √(S_m/s) of the r least singular values, W_res = W - s · B A

    MiLoRA (Wang et al., 2024, arXiv 2406.09044): what W does most stays frozen.
    """
    r = check_rank(site)
    u, s, vh = torch.linalg.svd(given_weight(site), full_matrices=False)
    return Drawn(*balanced(u[:, -r:], s[-r:], vh[-r:], scaling_of(site)))
