"""MiCA: B of minor left singular vectors, frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, check_rank, given_weight, register

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("mica")
def draw_mica(site: Site) -> Drawn:
    """W = U S Vᵀ, B = U_m of the r least singular values, frozen, and A = 0

    Minor Component Adaptation (arXiv 2604.01694), PEFT's ``mica``. W stays as it is.
    """
    r = check_rank(site)
    u, _, _ = torch.linalg.svd(given_weight(site), full_matrices=False)
    zeros = u.new_zeros(r, site.in_features)
    return Drawn(zeros, u[:, -r:].contiguous(), frozen=frozenset({"lora_B"}))
