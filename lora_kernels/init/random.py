"""Starts that look at nothing: LoRA's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base import Drawn, register

if TYPE_CHECKING:
    from ..adapters.site import Site


def empty(site: Site, *shape: int) -> Tensor:
    """A tensor of the adapter, uninitialised."""
    return torch.empty(*shape, device=site.device, dtype=site.dtype)


def kaiming(site: Site, *shape: int) -> Tensor:
    """Uniform within 1/√(last size), as ``nn.Linear`` starts."""
    return nn.init.kaiming_uniform_(empty(site, *shape), a=math.sqrt(5))


def zero_b(site: Site) -> Tensor:
    """B = 0."""
    return nn.init.zeros_(empty(site, site.out_features, site.config.r))


@register("_true")
def draw_kaiming(site: Site) -> Drawn:
    """A Kaiming-uniform, B = 0: LoRA (Hu et al., 2021, arXiv 2106.09685) as PEFT starts it: ``True``."""
    return Drawn(kaiming(site, site.config.r, site.in_features), zero_b(site))


@register("_false")
def draw_random(site: Site) -> Drawn:
    """A and B Kaiming-uniform, ΔW ≠ 0: ``False``."""
    return Drawn(
        kaiming(site, site.config.r, site.in_features), kaiming(site, site.out_features, site.config.r)
    )


@register("gaussian")
def draw_gaussian(site: Site) -> Drawn:
    """A of N(0, 1/r²), B = 0."""
    shape = site.config.r, site.in_features
    return Drawn(nn.init.normal_(empty(site, *shape), std=1 / site.config.r), zero_b(site))
