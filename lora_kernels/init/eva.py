"""EVA: the principal components of what a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .base import Drawn, check_rank, register, statistic
from .random import zero_b

if TYPE_CHECKING:
    from ..adapters.site import Site

SVD, ENERGY = "activation_svd", "activation_energy"


@register("eva", needs=SVD, options=("whiten",))
def draw_eva(site: Site) -> Drawn:
    """A = V_rᵀ of the centred inputs X - μ = U S Vᵀ, B = 0

    Explained Variance Adaptation (Paischer et al., 2024, arXiv 2410.07170). ``method_options``: ``whiten``
    divides each row by √S. :func:`rank_pattern` gives the ranks out by the variance that they explain.
    """
    found = statistic(site, SVD, None, site.in_features)
    r = check_rank(site, len(found))
    sizes = found[:r].norm(dim=1, keepdim=True)
    lora_a = found[:r] / sizes
    if site.option("whiten", False, (True, False)):
        lora_a = lora_a / sizes.sqrt()
    return Drawn(lora_a, zero_b(site).to(lora_a.device))


def rank_pattern(statistics: Mapping[str, Mapping[str, Tensor]], r: int, rho: float = 2.0) -> dict[str, int]:
    """Name -> rank: r · layers ranks given to the components that explain most of their layer's variance

    For ``LoRAConfig(rank_pattern=…)``; no layer gets more than r · ρ. A layer that gets none is left out
    by ``exclude_modules``.

    Raises:
        ValueError: ρ is below 1, or a layer has no ``activation_svd``.
    """
    if rho < 1:
        raise ValueError(f"rho: expected at least 1, got {rho}")
    most = round(r * rho)
    shares: list[tuple[float, str]] = []
    for name, of_site in statistics.items():
        if SVD not in of_site:
            raise ValueError(f"statistics: {name}: expected {SVD!r} of calibrate, got none")
        ratios = of_site[SVD][:most].square().sum(1) / of_site[ENERGY]
        shares += [(ratio, name) for ratio in ratios.tolist()]
    shares.sort(key=lambda pair: -pair[0])
    ranks = dict.fromkeys(statistics, 0)
    for _, name in shares[: r * len(statistics)]:
        ranks[name] += 1
    return ranks
