"""LoRAMoE: every expert on every row, and a loss that keeps two kinds of them apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters import Call, Site, register
from .base import ROUTES, Experts, Routes, Seen, scores, seen


@register("loramoe")
class LoRAMoE(Experts):
    """y = x Wᵀ + b + s · Σ_j w_j B_j A_j drop(x), w = softmax(x Rᵀ), over all experts j

    LoRAMoE (Dou et al., 2023, arXiv 2312.09979): one adapter of rank E·r with a gate for each row. All
    experts share one dropout mask, where the paper's code draws one for each. R ``[E, in]`` is ``router``,
    in float32 on a half-precision base. :func:`localized_balance_loss` is the paper's. ``method_options``:
    ``experts``.
    """

    router: nn.Parameter

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """R at random."""
        return {"router": site.kaiming(self.experts, site.in_features)}

    def route(self, x: Tensor, call: Call) -> Routes:
        """softmax(x Rᵀ)."""
        logits = scores(x, self.router)
        call.note(ROUTES, self.site, Seen(logits, None))
        return Routes(logits.softmax(-1))


def localized_balance_loss(call: Call, kinds: Tensor, delta: float = 0.1) -> Tensor:
    """Σ over layers of Var(Z) / mean(Z)², Z = I ⊙ Q, Q_ne the weight that sample n gives expert e in all

    I_ne is 1 + δ where the kind of sample n is that of expert e, else 1 − δ: the first half of the experts is
    of kind 1, the second of kind 0 (LoRAMoE, arXiv 2312.09979; its code divides by the square of the mean, as
    here, its text by the mean). 0 for a single sample. What it draws to is Z the same everywhere, so that a
    sample gives (1 − δ)/2 of its weight to the half whose I is 1 + δ: the kinds part, each to the other half.

    Args:
        call: of the :func:`lora_kernels.nn.side_inputs` in which the model ran.
        kinds: 0 or 1 for each sample ``[samples]``.
        delta: δ in [0, 1].

    Raises:
        ValueError: no router ran in the block, ``delta`` is out of range, or ``kinds`` are not one a sample.

    Examples:
        >>> from lora_kernels.nn import side_inputs
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="loramoe")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> with side_inputs(model) as call:
        ...     y = model(torch.randn(3, 2, 4))
        >>> loss = localized_balance_loss(call, kinds=torch.tensor([0, 1, 1]))
    """
    if not 0.0 <= delta <= 1.0:
        raise ValueError(f"delta: expected 0 <= delta <= 1, got {delta}")
    losses = [_of_layer(one.scores, kinds, delta) for one in seen(call).values()]
    return torch.stack(losses).sum()


def _of_layer(scores: Tensor, kinds: Tensor, delta: float) -> Tensor:
    weights = scores.softmax(-1)
    total = weights.flatten(1, -2).sum(1) if weights.dim() > 2 else weights
    if kinds.shape != total.shape[:1]:
        raise ValueError(
            f"kinds: expected one for each of {len(total)} samples, got shape {tuple(kinds.shape)}"
        )
    if len(total) < 2:
        return total.sum() * 0
    experts = total.shape[1]
    first = torch.arange(experts, device=total.device) < experts // 2
    own = (kinds.to(total.device)[:, None] == 1) == first
    z = total * torch.where(own, 1 + delta, 1 - delta)
    return z.var() / (z.mean().square() + 1e-10)
