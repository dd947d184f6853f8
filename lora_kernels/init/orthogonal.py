"""Orthogonal start: two random factors whose product is zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, register

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("orthogonal")
def draw_orthogonal(site: Site) -> Drawn:
    """A = (X Q₁)ᵀ/10, B = Y Q₂/10: X, Y normal, Q₁ and Q₂ the odd and the even rows of an orthogonal Q

    so that Q₂ Q₁ᵀ = 0, and ΔW with it, though neither factor is. PEFT's ``orthogonal``. The rank is even.
    """
    r = site.config.r
    if r % 2:
        raise ValueError(f"r: 'orthogonal' expects an even rank, got {r}")
    q, _ = torch.linalg.qr(torch.randn(r, r))
    lora_a = torch.randn(site.in_features, r // 2).mm(q[0::2]).T / 10
    lora_b = torch.randn(r // 2, site.out_features).T.mm(q[1::2]) / 10
    return Drawn(lora_a, lora_b)
