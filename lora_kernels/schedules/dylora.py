"""DyLoRA's sampler: another rank at each step, one for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..adapters import DyLoRA
from ..optim._common import check_count
from ._common import generator
from .base import Schedule


class DyLoRASampler(Schedule):
    """b uniform in 1 … r, or among ``ranks``, for the next step, one for all layers of the method ``dylora``

    DyLoRA (Valipour et al., 2022, arXiv 2210.07558). The first b is drawn at once, a layer of a smaller r
    takes the most it has; :meth:`finish` sets the rank to serve.

    Args:
        model: one with DyLoRA adapters.
        seed: of the draws.
        ranks: the ranks to draw from, such as ``(2, 8)``: mixed-rank training (2024, arXiv 2401.10447).

    Raises:
        TypeError: a rank is no int.
        ValueError: there are no such adapters, or a rank is above all of theirs.
    """

    key = "dylora_sampler"
    saved = ("rng", "rank")

    def __init__(self, model: nn.Module, *, seed: int = 0, ranks: Sequence[int] | None = None) -> None:
        super().__init__(model)
        self.rng = generator(seed)
        self.adapters = [one for one in model.modules() if isinstance(one, DyLoRA)]
        if not self.adapters:
            raise ValueError("model: expected adapters of the method 'dylora', got none")
        most = max(adapter.r for adapter in self.adapters)
        self.ranks = list(range(1, most + 1)) if ranks is None else list(ranks)
        if not self.ranks:
            raise ValueError("ranks: expected at least one, got none")
        for i, one in enumerate(self.ranks):
            check_count(f"ranks[{i}]", one)
            if one > most:
                raise ValueError(f"ranks[{i}]: expected at most {most}, got {one}")
        self.act(0)

    def act(self, step: int) -> None:
        """Draws the rank of the next step."""
        self.rank = self.ranks[int(torch.randint(len(self.ranks), (), generator=self.rng))]
        self.restored()

    def restored(self) -> None:
        """Sets the rank drawn last."""
        set_rank(self.adapters, self.rank)

    def finish(self, rank: int | None = None) -> None:
        """Sets the rank to serve, by default all.

        Raises:
            ValueError: no layer has so many.
        """
        most = max(adapter.r for adapter in self.adapters)
        rank = most if rank is None else rank
        if not 1 <= rank <= most:
            raise ValueError(f"rank: expected 1 to {most}, got {rank}")
        set_rank(self.adapters, rank)


def set_rank(adapters: list[DyLoRA], rank: int) -> None:
    """Makes ``rank``, or as much of it as an adapter has, the active one of each."""
    for adapter in adapters:
        adapter.set_rank(min(rank, adapter.r))
