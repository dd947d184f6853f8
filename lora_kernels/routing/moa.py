"""MoA, Mixture-of-LoRAs: a sequence's own expert in each layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Call, Site, register
from .base import ROUTES, Experts, Routes, Seen, pooled, scores, seen


@register("moa")
class MoA(Experts):
    """y_n = x_n Wᵀ + b + s · B_e A_e drop(x_n) for each sequence n, e = its domain, or argmax R · mean(x_n)

    Mixture-of-LoRAs (Feng et al., 2024, arXiv 2403.03432): experts are first trained by themselves, one a
    domain (:func:`lora_kernels.nn.fill_experts` puts them here); then each layer's router R ``[E, in]``
    learns from :func:`domain_loss`. x is ``[sequences, tokens, in]``, of a matrix each row is a sequence.
    With ``side_inputs(model, domain=labels)`` every layer uses the expert of the label; without, what its
    router says. The weight of the expert is 1, with the gradient of softmax(R · mean(x))_e, so that the
    task's loss reaches R too. Written from a summary of the paper: the mean, that labels rule, and this
    gradient are ours. ``method_options``: ``experts``.
    """

    router: nn.Parameter

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """R at random."""
        return {"router": site.kaiming(self.experts, site.in_features)}

    def route(self, x: Tensor, call: Call) -> Routes:
        """One expert for each sequence, with weight 1 and a gradient."""
        logits = scores(pooled(x), self.router)
        call.note(ROUTES, self.site, Seen(logits, None))
        given = call.get("domain")
        ids = logits.argmax(-1, keepdim=True) if given is None else _checked(given, logits)[..., None]
        share = logits.softmax(-1).gather(-1, ids)
        return Routes(1 + (share - share.detach()), ids)


def _checked(domain: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(domain, Tensor) or domain.is_floating_point() or domain.shape != logits.shape[:-1]:
        got = f"{domain.dtype} {tuple(domain.shape)}" if isinstance(domain, Tensor) else type(domain).__name__
        raise ValueError(f"domain: expected an integer for each of {len(logits)} sequences, got {got}")
    return domain.to(logits.device)


def domain_loss(call: Call, domain: Tensor) -> Tensor:
    """mean over layers of the cross entropy between softmax(R · mean(x)) and each sequence's domain

    Add η times it to the task's loss; η = 0.1 is ours.

    Args:
        call: of the :func:`lora_kernels.nn.side_inputs` in which the model ran.
        domain: a label for each sequence ``[sequences]``.

    Raises:
        ValueError: no router ran in the block.

    Examples:
        >>> from lora_kernels.nn import side_inputs
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="moa")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> with side_inputs(model) as call:
        ...     y = model(torch.randn(3, 2, 4))
        >>> loss = domain_loss(call, torch.tensor([0, 1, 1]))
    """
    losses = [F.cross_entropy(one.scores, _checked(domain, one.scores)) for one in seen(call).values()]
    return torch.stack(losses).mean()


def majority(call: Call) -> Tensor:
    """For each sequence what most layers' routers would take: a ``domain`` for the passes to come.

    Examples:
        >>> from lora_kernels.nn import side_inputs
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="moa")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> with side_inputs(model) as call:
        ...     y = model(torch.randn(3, 2, 4))
        >>> domain = majority(call)
    """
    votes = torch.stack([one.scores.argmax(-1) for one in seen(call).values()])
    return votes.mode(0).values
