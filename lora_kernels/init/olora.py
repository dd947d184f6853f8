"""OLoRA: the first columns of W's QR decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Drawn, check_rank, given_weight, register

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("olora", takes=True)
def draw_olora(site: Site) -> Drawn:
    """W = Q R, B = Q[:, :r], A = R[:r], W_res = W - s · B A

    OLoRA (Büyükakyüz, 2024, arXiv 2406.01775).
    """
    r = check_rank(site)
    q, triangle = torch.linalg.qr(given_weight(site))
    return Drawn(triangle[:r].contiguous(), q[:, :r].contiguous())
