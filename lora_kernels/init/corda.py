"""CorDA: singular vectors of W weighted by what the layer reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Drawn, balanced, check_rank, given_weight, register, scaling_of, statistic

if TYPE_CHECKING:
    from ..adapters.site import Site

COVARIANCE = "covariance"
_DAMPING, _INVERSE_ERROR = 0.01, 0.05


@register("corda", needs=COVARIANCE, takes=True, options=("corda_method",))
def draw_corda(site: Site) -> Drawn:
    """W F = U S Vᵀ, V̂ᵀ = Vᵀ F⁻¹, A = √(S_r/s) V̂_rᵀ, B = U_r √(S_r/s), W_res = W - s · B A

    CorDA (Yang et al., 2024, arXiv 2406.05223): F is the covariance of the inputs, damped until its inverse
    is one. ``method_options``: ``corda_method`` ``"ipm"`` takes the first r triplets (to learn a task like
    the samples), ``"kpm"`` the last (to keep what the samples know).
    """
    r, weight = check_rank(site), given_weight(site)
    principal = site.option("corda_method", "ipm", ("ipm", "kpm")) == "ipm"
    covariance = statistic(site, COVARIANCE, site.in_features, site.in_features)
    damped, inverse = _damped(covariance.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    places = slice(None, r) if principal else slice(-r, None)
    return Drawn(*balanced(u[:, places], s[places], vh[places] @ inverse, scaling_of(site)))


def _damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """F = C + δ · mean(diag C) · I and its inverse, δ doubled from 0.01 until ‖F F⁻¹ - I‖ < 0.05."""
    unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    size, damping = covariance.diagonal().mean(), _DAMPING
    if size <= 0:
        raise ValueError("statistics: expected a covariance of inputs that are not all zero, got zeros")
    for _ in range(64):
        damped = covariance + damping * size * unit
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, unit) < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise ValueError("statistics: expected a covariance that damping makes invertible, got another")
