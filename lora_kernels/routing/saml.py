"""SAML and X-LoRA: experts weighed by a router outside of the layers, their factors averaged or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Call, register
from .base import Experts, Routes

WEIGHTS = "expert_weights"


class _Given(Experts):
    """Experts whose weights come with the call, for all layers or by the layer's name."""

    def route(self, x: Tensor, call: Call) -> Routes:
        """What the call says.

        Raises:
            ValueError: it has no weights for this layer, or they do not fit x.
        """
        given: Any = call[WEIGHTS]
        weights = given.get(self.site) if isinstance(given, dict) else given
        lead = tuple(x.shape[:-1])
        shapes = [(*one, self.experts) for one in dict.fromkeys((lead[:1], lead))]
        if not isinstance(weights, Tensor) or tuple(weights.shape) not in shapes:
            got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            want = " or ".join(map(str, shapes))
            raise ValueError(f"{WEIGHTS}: expected {want} for the layer {self.site!r}, got {got}")
        return Routes(weights)


@register("saml")
class SAML(_Given):
    """y_n = x_n Wᵀ + b + s · B̄_n Ā_n drop(x_n), Ā_n = Σ_e p_ne A_e, B̄_n = Σ_e p_ne B_e for each utterance n

    SAML (Zhao et al., 2024, arXiv 2406.19706): p ``[utterances, E]`` comes with the call,
    ``side_inputs(model, expert_weights=router(x))``, from an :class:`UtteranceRouter` that all layers share
    or from any other. W may be quantised, as in the paper. ``method_options``: ``experts``.
    """

    count = 10
    fusion = True


@register("xlora")
class XLoRA(_Given):
    """y = x Wᵀ + b + s · Σ_e p_e B_e A_e drop(x) with the p of the call, for each sample or each token

    X-LoRA (Buehler & Buehler, 2024, arXiv 2402.07148): what its classifier makes of the hidden states of a
    pass without adapters is p ``[samples, tokens, E]``, or a dict of them by layer:
    ``side_inputs(model, expert_weights=p)``. ``method_options``: ``experts``.
    """


class UtteranceRouter(nn.Module):
    """p = softmax(Linear(AttnPool(Conv₃(x))) / T), AttnPool(x) = Σ_t softmax_t(vᵀ x_t + c) x_t

    SAML's router of an utterance (arXiv 2406.19706). x is ``[utterances, frames, width]``, p is
    ``[utterances, E]``; ``memory`` ``[utterances, frames, width]`` is pooled too and joined for a decoder's.

    Args:
        width: of x.
        experts: E.
        temperature: T.
        cross: whether a ``memory`` is joined.

    Raises:
        ValueError: x is of another shape, or ``memory`` is missing or not expected.
    """

    def __init__(self, width: int, experts: int, temperature: float = 1.0, cross: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.attention = nn.Linear(width, 1)
        self.head = nn.Linear(width * (2 if cross else 1), experts)
        self.temperature, self.cross = temperature, cross

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """The weights of each utterance."""
        if x.dim() != 3 or x.shape[2] != self.convolution.in_channels:
            width = self.convolution.in_channels
            raise ValueError(f"x: expected [utterances, frames, {width}], got shape {tuple(x.shape)}")
        if (memory is not None) != self.cross:
            got = "None" if memory is None else "a Tensor"
            raise ValueError(f"memory: expected {'a Tensor' if self.cross else 'None'}, got {got}")
        parts = [self._pool(self.convolution(x.transpose(1, 2)).transpose(1, 2))]
        parts += [] if memory is None else [self._pool(memory)]
        return (self.head(torch.cat(parts, -1)) / self.temperature).softmax(-1)

    def _pool(self, x: Tensor) -> Tensor:
        return (self.attention(x).softmax(1) * x).sum(1)


def train_by_turns(step: int, router: nn.Module, model: nn.Module) -> None:
    """Lets the router train in even steps, and in odd ones the experts of ``model`` (SAML's interleaving).

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="saml")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> train_by_turns(0, UtteranceRouter(4, 4), model)
        >>> any(p.requires_grad for p in model.parameters())
        False
    """
    router.requires_grad_(step % 2 == 0)
    for module in model.modules():
        if isinstance(module, _Given):
            module.set_trainable(step % 2 == 1)
