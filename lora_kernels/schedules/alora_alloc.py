"""ALoRA's allocator: ranks move to the layers where taking one away hurts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim._common import check_count
from ._common import active_of, fill_kaiming_, generator
from .base import Schedule


class ALoRAAllocator(Schedule):
    """IS(i) = L(M without rank i) - L(M with rank i alone); the n least go off, and as many on elsewhere

    ALoRA (Liu et al., 2024, arXiv 2403.16187), on adapters of ``LoRAConfig(method="alora_alloc")``: L is the
    loss of one validation batch, n the number of layers. In each round the n ranks that matter least, over
    all layers, are switched off, and n new ones on in the layers that lost none: as evenly as can be, the
    rest of the division to those of higher mean score, and nobody gets more than r. A new rank has
    a new row of A and a column of zeros in B (the paper does not say), so that it changes no output; what an
    optimiser knows of the two is forgotten. A round takes two forward passes a rank.

    Args:
        model: one of :func:`apply_lora` with such adapters.
        loss: gives L of the model as it is; it is called without gradients, in evaluation mode.
        optimizer: the one that trains the adapters.
        first: steps before the first round (an epoch in the paper).
        every: steps between rounds (a quarter of one).
        rounds: how many at most.
        seed: of new rows of A.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or the model has no such adapters.
    """

    key = "alora_alloc"
    saved = ("done", "rng")

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Any],
        optimizer: Optimizer | None = None,
        *,
        first: int = 100,
        every: int = 25,
        rounds: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer)
        for name, count in (("first", first), ("every", every), ("rounds", rounds)):
            check_count(name, count)
        self.adapters = active_of(model, self.key)
        self.loss, self.first, self.every, self.rounds = loss, first, every, rounds
        self.done, self.rng = 0, generator(seed)

    def act(self, step: int) -> None:
        """A round, where it is time."""
        if step >= self.first and (step - self.first) % self.every == 0 and self.done < self.rounds:
            self.allocate(self.scores())
            self.done += 1

    @property
    def ranks(self) -> dict[str, int]:
        """Name of each layer → how many of its ranks are on."""
        return {name: int(one.alive.sum()) for name, one in self.adapters.items()}

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """IS of each rank, by layer; of those that are off it is infinite."""
        found = {name: torch.full(one.alive.shape, torch.inf) for name, one in self.adapters.items()}
        with self._evaluating():
            for name, one in self.adapters.items():
                for i in one.alive.nonzero().flatten().tolist():
                    one.alive[i] = False
                    without = float(self.loss())
                    one.alive[i] = True
                    found[name][i] = without - self._alone(one, i)
        return found

    def _alone(self, adapter: Any, i: int) -> float:
        """L with this rank alone."""
        before = [one.alive.clone() for one in self.adapters.values()]
        try:
            for one in self.adapters.values():
                one.alive.zero_()
            adapter.alive[i] = True
            return float(self.loss())
        finally:
            for one, alive in zip(self.adapters.values(), before, strict=True):
                one.alive.copy_(alive)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, its switches as they were behind it."""
        modes = [(module, module.training) for module in self.model.modules()]
        before = [one.alive.clone() for one in self.adapters.values()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for one, alive in zip(self.adapters.values(), before, strict=True):
                one.alive.copy_(alive)

    @torch.no_grad()
    def allocate(self, scores: dict[str, Tensor]) -> None:
        """Switches the least off, and as many on in the layers that lost none."""
        count = min(len(self.adapters), sum(self.ranks.values()) - 1)
        places = [(name, i) for name, one in scores.items() for i in range(len(one))]
        order = torch.cat(list(scores.values())).argsort(stable=True)[:count].tolist()
        for name, i in (places[at] for at in order):
            self.adapters[name].alive[i] = False
        lost = {places[at][0] for at in order}
        for name, i in self._rooms({name: one for name, one in scores.items() if name not in lost})[:count]:
            self._start(self.adapters[name], i)

    def _rooms(self, scores: dict[str, Tensor]) -> list[tuple[str, int]]:
        """Ranks that are off, one of each layer in turn, those of a higher mean score first."""
        means = {name: one[one.isfinite()].mean().nan_to_num(-torch.inf) for name, one in scores.items()}
        first = sorted(scores, key=lambda name: float(means[name]), reverse=True)
        off = [(~self.adapters[name].alive).nonzero().flatten().tolist() for name in first]
        turns = itertools.zip_longest(*off)
        return [(name, i) for turn in turns for name, i in zip(first, turn, strict=True) if i is not None]

    def _start(self, adapter: Any, i: int) -> None:
        """A new rank, which changes no output."""
        fill_kaiming_(adapter.lora_A[i], self.rng)
        adapter.lora_B[:, i] = 0
        adapter.alive[i] = True
        for factor, place in ((adapter.lora_A, (i,)), (adapter.lora_B, (slice(None), i))):
            for value in (self.optimizer.state.get(factor, {}) if self.optimizer else {}).values():
                if isinstance(value, Tensor) and value.shape == factor.shape:
                    value[place] = 0
