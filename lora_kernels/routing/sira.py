"""SiRA: the best k experts, each of limited capacity, some left out at random."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters import Call, Site, register
from .base import ROUTES, Experts, Routes, Seen, scores
from .choose import best, capacity_of, leave_out, share_option, whole_top_k, within_capacity


@register("sira")
class SiRA(Experts):
    """y = x Wᵀ + b + s · Σ_{j in TopK} w_j B_j A_j drop(x), w the softmax of x Rᵀ over the chosen k

    SiRA (Zhu et al., 2023, arXiv 2311.09179). In training experts are left out with probability
    ``expert_dropout`` for all rows of a batch, ``top_k`` of them at least remain; and an expert takes the
    first ⌈capacity · k · rows / E⌉ rows that chose it, in their order, no more: a row beyond that goes
    without it. In evaluation neither holds, so that no row depends on its batch. R ``[E, in]`` is ``router``,
    from N(0, 0.02²). :func:`lora_kernels.routing.balance_loss` is its load loss.

    The paper names these parts and has no code; in which order softmax and choice come, how experts are
    dropped and the defaults are ours. ``method_options``: ``experts``, ``top_k``, ``capacity`` (``None``: no
    limit), ``expert_dropout``.
    """

    router: nn.Parameter
    options = Experts.options | {"top_k", "capacity", "expert_dropout"}
    count = 16

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """R at random."""
        self.top_k = whole_top_k(site, self.experts, min(4, self.experts))
        self.expert_dropout = share_option(site, "expert_dropout", 0.1)
        self.capacity = site.option("capacity", 1.25)
        if self.capacity is not None and not (isinstance(self.capacity, (int, float)) and self.capacity > 0):
            raise ValueError(f"method_options: capacity: expected a number above 0, got {self.capacity!r}")
        return {"router": site.normal(self.experts, site.in_features, std=0.02)}

    def route(self, x: Tensor, call: Call) -> Routes:
        """The best of x Rᵀ that were not left out and have room."""
        logits = kept = scores(x, self.router)
        if self.training and self.expert_dropout:
            kept = leave_out(logits, self.expert_dropout, self.top_k)
        routes = best(kept, self.top_k)
        call.note(ROUTES, self.site, Seen(logits, routes.ids))
        if self.training and self.capacity is not None and routes.ids is not None:
            rows = x.shape[:-1].numel()
            limit = capacity_of(self.capacity, self.top_k, rows, self.experts)
            return within_capacity(routes, self.experts, limit)
        return routes
