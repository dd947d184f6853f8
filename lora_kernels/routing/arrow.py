"""Arrow: trained adapters routed by the direction that each reacts to most, without training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters import Call, Site, register
from .base import ROUTES, Experts, Routes, Seen, scores
from .choose import best, whole_top_k


@register("arrow")
class Arrow(Experts):
    """y = x Wᵀ + b + s · Σ_j w_j B_j A_j drop(x), w = softmax(|x P_jᵀ| / T), over the ``top_k`` largest

    Arrow (Ostapenko et al., 2024, arXiv 2405.11157): P_j, a row of ``router`` ``[E, in]``, is the right
    singular vector of B_j A_j of the largest singular value, and does not train; :meth:`filled`, which
    :func:`lora_kernels.nn.fill_experts` calls, makes it of the experts. ``method_options``: ``experts``,
    ``top_k``, ``temperature`` (T).
    """

    router: nn.Parameter
    frozen = frozenset({"router"})
    options = Experts.options | {"top_k", "temperature"}

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """Directions at random, until there are experts."""
        self.top_k = whole_top_k(site, self.experts, min(3, self.experts))
        self.temperature = site.option("temperature", 1.0)
        if not isinstance(self.temperature, (int, float)) or self.temperature <= 0:
            raise ValueError(
                f"method_options: temperature: expected a number above 0, got {self.temperature!r}"
            )
        return {"router": site.kaiming(self.experts, site.in_features)}

    @torch.no_grad()
    def filled(self) -> None:
        """Takes each expert's direction, of R A with B = Q R: right singular vectors as of B A."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        lora_as = self.lora_A.to(wide).unflatten(0, (self.experts, self.r))
        lora_bs = self.lora_B.to(wide).T.unflatten(0, (self.experts, self.r)).transpose(1, 2)
        small = torch.linalg.qr(lora_bs).R @ lora_as
        self.router.copy_(torch.linalg.svd(small, full_matrices=False).Vh[:, 0])

    def route(self, x: Tensor, call: Call) -> Routes:
        """The best of softmax(|x Pᵀ| / T)."""
        logits = scores(x, self.router).abs() / self.temperature
        routes = best(logits, self.top_k)
        call.note(ROUTES, self.site, Seen(logits, routes.ids))
        return routes
