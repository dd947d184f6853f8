"""RAMoLE: retrieved adapters weighed, token by token, by how what they add fits a router of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Call, LowRank, Site, register
from .base import ROUTES, Experts, Routes, Seen
from .choose import leave_out, share_option


@register("ramole")
class RAMoLE(Experts):
    """y = x Wᵀ + b + Σ_e α_e v_e, v_e = s B_e A_e x, α = softmax_e ⟨A_R x, B_Rᵀ v_e⟩ / √r_R

    RAMoLE (Zhao et al., 2024, arXiv 2406.16989). The experts are adapters trained before
    (:func:`lora_kernels.nn.fill_experts`) and frozen; ``router_A`` ``[r_R, in]`` and ``router_B``
    ``[out, r_R]`` train, B_R from 0, where α is uniform. No v_e is formed: ⟨A_R x, B_Rᵀ v_e⟩ =
    s (A_R x)ᵀ G_e (A_e x) with G_e = B_Rᵀ B_e ``[r_R, r]``, and A_R x and all A_e x are one product.
    ``side_inputs(model, candidates=ids)``, ``[samples, k]`` with -1 for none, says what was retrieved for
    each sample; those alone are computed. In training a candidate is left out with probability
    ``candidate_dropout``, one at least remains.

    Written from a summary of the paper; the start of the router and the probability are ours.
    ``method_options``: ``experts``, ``router_rank``, ``candidate_dropout``.
    """

    router_A: nn.Parameter
    router_B: nn.Parameter
    frozen = frozenset({"lora_A", "lora_B"})
    options = Experts.options | {"router_rank", "candidate_dropout"}

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """A_R at random, B_R of zeros."""
        self.router_rank = site.whole_option("router_rank", 8)
        self.candidate_dropout = share_option(site, "candidate_dropout", 0.0)
        down = site.kaiming(self.router_rank, site.in_features)
        return {"router_A": down, "router_B": site.zeros(site.out_features, self.router_rank)}

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """All A_e x at once, and α as their gate."""
        assert x is not None and call is not None
        present, mask = self._candidates(x, call)
        lora_a, lora_b = self._of(present)
        q, h = F.linear(self.drop(x), torch.cat([self.router_A, lora_a]).to(x.dtype)).split(
            [self.router_rank, len(lora_a)], -1
        )
        logits = self._scores(q, h, lora_b).masked_fill(~mask, -torch.inf)
        if self.training and self.candidate_dropout:
            logits = self._leave_out(logits, mask)
        call.note(ROUTES, self.site, Seen(logits, None))
        # A sample without a candidate has −∞ for all, and gets the base alone.
        alpha = torch.where(mask, logits.softmax(-1), 0)
        return LowRank(None, lora_b, self.scaling, self.gate(alpha, x), h)

    def route(self, x: Tensor, call: Call) -> Routes:
        """α of every expert is what :meth:`lower` has in its gate."""
        raise NotImplementedError("RAMoLE: its weights follow from what the experts make of x")

    def _scores(self, q: Tensor, h: Tensor, lora_b: Tensor) -> Tensor:
        """s qᵀ G_e h_e / √r_R, in the router's dtype."""
        wide = self.router_A.dtype
        grams = self.router_B.T @ lora_b
        each = ((q.to(wide) @ grams) * h.to(wide)).unflatten(-1, (-1, self.r)).sum(-1)
        return self.scaling * self.router_rank**-0.5 * each

    def _of(self, present: Tensor | None) -> tuple[Tensor, Tensor]:
        if present is None:
            return self.lora_A, self.lora_B
        ranks = (present[:, None] * self.r + torch.arange(self.r, device=present.device)).flatten()
        return self.lora_A[ranks], self.lora_B[:, ranks]

    def _candidates(self, x: Tensor, call: Call) -> tuple[Tensor | None, Tensor]:
        """The experts that any sample has, ``None`` for all, and which each has: broadcast over its rows."""
        given = call.get("candidates")
        if given is None:
            return None, torch.ones(self.experts, dtype=torch.bool, device=x.device)
        if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != x.shape[0]:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"candidates: expected ids [{x.shape[0]}, k], got {got}")
        given = given.to(x.device)
        present = given[given >= 0].unique()
        if len(present) and int(present[-1]) >= self.experts:
            raise ValueError(f"candidates: expected below {self.experts}, got {int(present[-1])}")
        mask = (given[:, :, None] == present).any(1)
        return present, mask.view(len(given), *(1,) * (x.dim() - 2), len(present))

    def _leave_out(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Drops candidates of each sample; where that leaves none, all stay."""
        kept = leave_out(logits, self.candidate_dropout, 1, (logits.shape[0],) if logits.dim() > 1 else ())
        none = (kept == -torch.inf).all(-1, keepdim=True) & mask.any(-1, keepdim=True)
        return torch.where(none, logits, kept)
