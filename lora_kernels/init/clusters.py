"""AdvLoRA's start: clusters of the rows of W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Drawn, check_rank, given_weight, register, scaling_of

if TYPE_CHECKING:
    from ..adapters.site import Site


@register("clusters", takes=True, options=("rounds", "seed", "align"))
def draw_clusters(site: Site) -> Drawn:
    """A = C / s, B_ik = [row i of W is in cluster k], W_res = W - s · B A; C: the means of r clusters

    AdvLoRA (Ji et al., 2024, arXiv 2404.13425) as rebuilt from its abstract ("parameter clustering and
    alignment"), not from its text. ``method_options``: ``rounds`` of Lloyd's algorithm (10), ``seed`` of its
    start (0); ``align=True`` turns both factors by the orthogonal matrix that brings A nearest to that of
    PiSSA, which leaves s · B A as it is and B no longer of zeros and ones.
    """
    r, weight = check_rank(site, site.out_features), given_weight(site)
    rounds, seed = site.whole_option("rounds", 10, 0), site.whole_option("seed", 0, 0)
    centres, places = cluster_rows(weight, r, rounds, seed)
    lora_a = centres / scaling_of(site)
    lora_b = torch.nn.functional.one_hot(places, r).to(weight.dtype)
    if site.option("align", False, (True, False)):
        turn = _nearest_turn(lora_a, weight, scaling_of(site))
        lora_a, lora_b = turn @ lora_a, lora_b @ turn.T
    return Drawn(lora_a, lora_b)


def cluster_rows(weight: Tensor, count: int, rounds: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means of the rows of W ``[out, in]``: the means ``[count, in]`` and each row's place ``[out]``

    Lloyd's algorithm, started as k-means++; Σ ‖w_i - c_i‖² never grows from one round to the next.
    """
    rng = torch.Generator().manual_seed(seed)
    centres = _spread(weight, count, rng)
    places = torch.cdist(weight, centres).argmin(1)
    for _ in range(rounds):
        centres = _means(weight, places, centres)
        before, places = places, torch.cdist(weight, centres).argmin(1)
        if torch.equal(before, places):
            break
    return centres, places


def _spread(weight: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Rows to start from, each drawn by its squared distance to those before."""
    chosen = [int(torch.randint(len(weight), (), generator=rng))]
    far = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    while len(chosen) < count:
        far = torch.minimum(far, (weight - weight[chosen[-1]]).square().sum(1).cpu().double())
        chances = far if far.any() else torch.ones_like(far)
        chosen.append(int(torch.multinomial(chances, 1, generator=rng)))
    return weight[chosen]


def _means(weight: Tensor, places: Tensor, centres: Tensor) -> Tensor:
    """The mean of each cluster; an empty one stays where it is."""
    sums = torch.zeros_like(centres).index_add_(0, places, weight)
    counts = torch.bincount(places, minlength=len(centres))[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), centres)


def _nearest_turn(lora_a: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """The orthogonal R that makes ‖R A - √(S/s) Vᵀ‖ least (Procrustes)."""
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)
    r = min(len(lora_a), len(s))
    target = torch.zeros_like(lora_a)
    target[:r] = (s[:r] / scaling).sqrt()[:, None] * vh[:r]
    u, _, v = torch.linalg.svd(target @ lora_a.T)
    return u @ v
