"""LoRA-GA: singular vectors of W's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Drawn, check_rank, given_weight, register, scaling_of, statistic

if TYPE_CHECKING:
    from ..adapters.site import Site

GRADIENT = "gradient"
DIRECTIONS = ("ArB2r", "ArBr", "A2rBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@register("lora_ga", needs=GRADIENT, takes=True, options=("direction", "scale", "stable_gamma"))
def draw_lora_ga(site: Site) -> Drawn:
    """G ≈ U S Vᵀ of rank 2r, A = V[:, I_A]ᵀ, B = c U[:, I_B] S[I_B], W_res = W - s · B A

    LoRA-GA (Wang et al., 2024, arXiv 2407.05000), with PEFT's options in ``method_options``. ``direction``:
    ``ArB2r`` (A the first r, B the next), ``A2rBr`` (the other way), ``ArBr`` (alternating, B first) or
    ``random``. ``scale``: ``stable`` (c = out^¼/√``stable_gamma``, 16), ``weight_svd``, ``gd_scale`` (both
    factors over s) or ``unit``. The decomposition is randomised, by torch's generator.
    """
    r, out = check_rank(site, min(site.in_features, site.out_features) // 2), site.out_features
    direction = site.option("direction", "ArB2r", DIRECTIONS)
    scale = site.option("scale", "stable", SCALES)
    gamma = site.option("stable_gamma", 16)
    gradient = statistic(site, GRADIENT, out, site.in_features)
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    of_a, of_b = _places(direction, r)
    lora_a, lora_b = v.T[of_a], u[:, of_b] * s[of_b]
    if scale == "stable":
        lora_b = lora_b * (out**0.25 / gamma**0.5)
    elif scale == "gd_scale":
        lora_a, lora_b = lora_a / scaling_of(site), lora_b / scaling_of(site)
    elif scale == "weight_svd" and s[of_b][0] > 0:
        _, of_weight, _ = torch.svd_lowrank(given_weight(site), q=r, niter=4)
        lora_b = lora_b * (of_weight[0] / s[of_b][0])
    return Drawn(lora_a.contiguous(), lora_b.contiguous())


def _places(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the 2r vectors A and B take."""
    every = torch.arange(2 * r)
    if direction == "random":
        some = torch.randperm(2 * r)[:r]
        return some, some
    return {"ArBr": (every[1::2], every[0::2]), "A2rBr": (every[r:], every[:r])}.get(
        direction, (every[:r], every[r:])
    )
