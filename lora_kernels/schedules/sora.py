"""SoRA's schedule: the gates' proximal step, with a threshold that grows by stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters import SoRA
from ..optim._common import check_count, check_number
from .base import Schedule


class SoRASchedule(Schedule):
    """g ← sign(g) · max(|g| - ξ, 0) after each step of the optimiser, ξ = ``xis[stage]``

    SoRA (Ding et al., 2023, arXiv 2311.11696). One ξ is its training without a schedule; several are its
    Algorithm 1, each stage going on from the weights of the one before: the authors' program has
    ``torch.linspace(0, 7e-4, 7)``, 50 epochs of the first and 15 of each further. ξ is not times the learning
    rate, as in that program; the step is the proximal one (the program's own zeroes every |g| < 2ξ).
    ``sparsity`` holds the share of closed gates at the end of each stage done. Train the gates without decay,
    and with :func:`gate_penalty` in the loss where you want the paper's too.

    Args:
        model: one with adapters of the method ``sora``.
        xis: ξ of each stage, not falling.
        steps: of each stage, one number a stage; the last goes on for ever.

    Raises:
        ValueError: no such adapters, numbers out of range, or not as many steps as stages.
    """

    key = "sora_schedule"
    saved = ("sparsity",)

    def __init__(
        self, model: nn.Module, *, xis: Sequence[float] = (3e-4,), steps: Sequence[int] = (1,)
    ) -> None:
        super().__init__(model)
        self.adapters = [one for one in model.modules() if isinstance(one, SoRA)]
        if not self.adapters:
            raise ValueError("model: expected adapters of the method 'sora', got none")
        self.xis, self.lengths = [float(xi) for xi in xis], list(steps)
        if not self.xis or len(self.xis) != len(self.lengths):
            raise ValueError(f"steps: expected one for each of {len(self.xis)} xis, got {len(self.lengths)}")
        for i, xi in enumerate(self.xis):
            check_number(f"xis[{i}]", xi, self.xis[i - 1] if i else 0.0)
        for i, length in enumerate(self.lengths):
            check_count(f"steps[{i}]", length)
        self.sparsity: list[float] = []

    def stage(self, step: int) -> int:
        """The stage that step number ``step`` belongs to."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return min(sum(step > end for end in ends), len(ends) - 1)

    def act(self, step: int) -> None:
        """The proximal step, and a stage's sparsity where it ends."""
        stage = self.stage(step)
        for adapter in self.adapters:
            adapter.prox_(self.xis[stage])
        if step == sum(self.lengths[: stage + 1]):
            gates = torch.cat([adapter.gate.detach() for adapter in self.adapters])
            self.sparsity = [*self.sparsity, float((gates == 0).float().mean())]


def gate_penalty(model: nn.Module) -> Tensor:
    """Σ|g| / n over the n gate numbers of all SoRA adapters; the authors' loss has λ times it too.

    Raises:
        ValueError: there are none.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="sora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> loss = 0.1 * gate_penalty(model)
    """
    gates = [one.gate.flatten() for one in model.modules() if isinstance(one, SoRA)]
    if not gates:
        raise ValueError("model: expected adapters of the method 'sora', got none")
    return torch.cat(gates).abs().mean()
