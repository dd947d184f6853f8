"""A schedule that acts on adapters and their W once in so many steps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim._common import check_count
from ._common import check_unmerged, factors, forget_, generator, merge_, mergeable_pairs, restart_
from .base import Schedule


class Periodic(Schedule):
    """Every so many steps the adapters go into W and start anew; a subclass writes :meth:`cycle`."""

    with_optimizer = True
    moves_base = True
    saved: ClassVar[tuple[str, ...]] = ("rng",)

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, every: int, seed: int) -> None:
        super().__init__(model, optimizer)
        check_count("every", every)
        self.every, self.rng = every, generator(seed)
        self.pairs = mergeable_pairs(model)

    def act(self, step: int) -> None:
        """A cycle's end, where it is one."""
        if self.due(step):
            check_unmerged(self.pairs)
            self.cycle()

    def due(self, step: int) -> bool:
        """Whether a cycle ends with this step."""
        return step % self.every == 0

    def cycle(self) -> None:
        """What a cycle's end does."""
        raise NotImplementedError(f"{type(self).__name__}: cycle")

    def merge_and_restart(self, factor: float = 1.0) -> None:
        """W ← W + factor · s · B A, and new adapters."""
        for pair in self.pairs:
            merge_(pair, factor)
            restart_(pair, self.rng)

    def forget(self) -> None:
        """What the optimiser knows of the factors."""
        assert self.optimizer is not None
        forget_(self.optimizer, factors(self.pairs))

    def moments(self) -> list[torch.Tensor]:
        """The tensors of the optimiser's state that have a factor's shape."""
        assert self.optimizer is not None
        found = []
        for factor in factors(self.pairs):
            state = self.optimizer.state.get(factor, {})
            found += [
                one for one in state.values() if isinstance(one, torch.Tensor) and one.shape == factor.shape
            ]
        return found
