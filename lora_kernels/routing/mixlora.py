"""MixLoRA: each row uses the few experts that its router likes best."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters import Call, Site, register
from .base import ROUTES, Experts, Routes, Seen, scores
from .choose import best, whole_top_k


@register("mixlora")
class MixLoRA(Experts):
    """y = x Wᵀ + b + s · Σ_j w_j B_j A_j drop(x), w = softmax(x Rᵀ), over the ``top_k`` largest w

    MixLoRA (Li et al., 2024, arXiv 2404.15159), for each row of x by itself. The weights of the chosen are
    divided by their sum unless ``norm_topk_prob`` is false; with ``top_k=1`` they are then 1, and the router
    learns from :func:`lora_kernels.routing.balance_loss` alone. R ``[E, in]`` is ``router``; it computes in
    float32 on a half-precision base. ``method_options``: ``experts``, ``top_k`` (``None``: all),
    ``norm_topk_prob``.
    """

    router: nn.Parameter
    options = Experts.options | {"top_k", "norm_topk_prob"}
    chosen: int | None = 2

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """R at random."""
        self.top_k = whole_top_k(site, self.experts, self.chosen)
        self.norm_topk_prob = bool(site.option("norm_topk_prob", True, (True, False)))
        return {"router": site.kaiming(self.experts, site.in_features)}

    def route(self, x: Tensor, call: Call) -> Routes:
        """The best of softmax(x Rᵀ)."""
        logits = scores(x, self.router)
        routes = best(logits, self.top_k, self.norm_topk_prob)
        call.note(ROUTES, self.site, Seen(logits, routes.ids))
        return routes
