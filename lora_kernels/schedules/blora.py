"""Bayesian-LoRA's training: a warm-up without gates, and the price of those that are open."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..optim._common import check_number
from ..quant.gated import expected_grids, open_chance
from ._common import active_of, fill_, generator
from .base import Schedule


class BLoRA(Schedule):
    """Plain factors for ``warmup`` steps, then quantised ones behind sampled gates

    Bayesian-LoRA (Meo et al., 2024, arXiv 2406.13046), on adapters of ``LoRAConfig(method="blora")``. Add λ
    times :func:`blora_gate_loss` to the loss, 10⁻³ in the paper, and give the gates a higher rate (10⁻²):
    the parameters called ``bit_gates``, ``rank_gates`` and ``ranges``.

    Gates are drawn once a step.

    Args:
        model: one of :func:`apply_lora` with such adapters.
        warmup: steps at the start (two epochs in the paper).
        seed: of the draws.

    Raises:
        TypeError: of a wrong type.
        ValueError: a negative number, or the model has no such adapters.
    """

    key = "blora"
    saved = ("rng", "noise")

    def __init__(self, model: nn.Module, *, warmup: int = 0, seed: int = 0) -> None:
        super().__init__(model)
        check_number("warmup", warmup)
        self.adapters = active_of(model, self.key)
        self.warmup, self.rng = warmup, generator(seed)
        self.noise = {
            name: one.bit_gates.new_empty(one.bit_gates.numel() + one.r - 1)
            for name, one in self.adapters.items()
        }
        self._draw()
        self.restored()

    def act(self, step: int) -> None:
        """New gates, and from the end of the warm-up on they count."""
        self._draw()
        self._use(step >= self.warmup)

    def restored(self) -> None:
        """The gates as they were."""
        self._use(self.steps >= self.warmup)

    def _draw(self) -> None:
        for noise in self.noise.values():
            fill_(noise, self.rng, "uniform_")

    def _use(self, quantising: bool) -> None:
        for name, one in self.adapters.items():
            one.quantising, one.noise = quantising, self.noise[name]


def blora_gate_loss(model: nn.Module) -> Tensor:
    """Σ R(A) + R(B) + mean_i π_i · R(E), R = 1 + π₄ (1 + π₈ (1 + π₁₆ (1 + π₃₂)))

    π is the chance that a gate is open: of a number of bits, or of a rank but the first. During the warm-up,
    when no gate counts, they cost nothing, or all of them would close before it ends.

    Raises:
        ValueError: the model has no adapters of the method ``blora``.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="blora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> loss = 0.01 * blora_gate_loss(model)
    """
    total = []
    for one in active_of(model, BLoRA.key).values():
        grids = expected_grids(one.bit_gates)
        ranks = open_chance(one.rank_gates[1:]).mean() if one.r > 1 else torch.ones_like(grids[2])
        price = grids[0] + grids[1] + ranks * grids[2]
        total.append(price if one.quantising else torch.zeros_like(price))
    return torch.stack(total).sum()


def bit_operations(model: nn.Module, bits_of_x: int = 32) -> int:
    """Σ MACs · bits of the factor · bits of x of one row through all adapters, the ranks that are on alone

    Raises:
        ValueError: the model has no adapters of the method ``blora``.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="blora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> cost = bit_operations(model)
    """
    total = 0
    for one in active_of(model, BLoRA.key).values():
        rank, bits = int(one.rank_gate().detach().sum()), one.bits()
        per_rank = bits["lora_A"] * one.in_features + bits["lora_B"] * one.out_features + bits["lora_E"]
        total += rank * per_rank * bits_of_x
    return total
