"""LISA: a few blocks train at a time, drawn by lot."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim._common import check_count
from ._common import forget_, generator
from .base import Schedule


class LISA(Schedule):
    """Every K steps γ of the N blocks are drawn without replacement; they train, the others do not

    LISA (Pan et al., 2024, arXiv 2403.17919). What trains outside of the blocks (embedding, last norm, head)
    always does. In a block what trains when this is built counts, be it whole weights or A and B; a frozen
    block keeps no x for their gradients and its gradients are dropped, so that an optimiser passes it by.
    Each block trains γ/N of the time. Its moments stay, unless ``drop_state``.

    Args:
        model: any module.
        blocks: its blocks, such as ``model.model.layers``.
        optimizer: needed with ``drop_state``.
        n_active: γ.
        interval: K.
        drop_state: whether the optimiser forgets what stops training: less memory, other numbers.
        seed: of the lot.

    Raises:
        TypeError: of a wrong type.
        ValueError: fewer blocks than γ, one that is not in the model or has nothing that trains, or a
            parameter in two of them.
    """

    key = "lisa"
    saved = ("rng", "active")

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        optimizer: Optimizer | None = None,
        *,
        n_active: int = 2,
        interval: int = 20,
        drop_state: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer)
        check_count("n_active", n_active)
        check_count("interval", interval)
        self.interval, self.with_optimizer = interval, drop_state  # type: ignore[misc]
        self.params = _parameters(model, list(blocks))
        if n_active > len(self.params):
            raise ValueError(f"n_active: expected at most the {len(self.params)} blocks, got {n_active}")
        self.n_active, self.rng = n_active, generator(seed)
        self._draw()

    def act(self, step: int) -> None:
        """Draws other blocks, where it is time."""
        if step % self.interval == 0:
            self._draw()
            if self.with_optimizer and self.optimizer is not None:
                every = [one for params in self.params for one in params]
                forget_(self.optimizer, [one for one in every if not one.requires_grad])

    def restored(self) -> None:
        """The blocks of the checkpoint train."""
        self._activate()

    def check_state(self, name: str, own: object, given: object) -> None:
        """The blocks must be there."""
        super().check_state(name, own, given)
        count = len(self.params)
        if name == "active" and not all(0 <= one < count for one in given):  # type: ignore[attr-defined]
            raise ValueError(f"state['active']: expected blocks below {count}, got {given}")

    def _draw(self) -> None:
        order = torch.randperm(len(self.params), generator=self.rng)
        self.active = sorted(order[: self.n_active].tolist())
        self._activate()

    def _activate(self) -> None:
        for i, params in enumerate(self.params):
            for parameter in params:
                parameter.requires_grad_(i in self.active)
                if i not in self.active:
                    parameter.grad = None


def _parameters(model: nn.Module, blocks: list[nn.Module]) -> list[list[nn.Parameter]]:
    """What trains in each block."""
    known = {id(module) for module in model.modules()}
    found: list[list[nn.Parameter]] = []
    seen: set[int] = set()
    for i, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise TypeError(f"blocks[{i}]: expected an nn.Module, got {type(block).__name__}")
        if id(block) not in known:
            raise ValueError(
                f"blocks[{i}]: expected a module of the model, got another {type(block).__name__}"
            )
        params = [parameter for parameter in block.parameters() if parameter.requires_grad]
        if not params:
            raise ValueError(f"blocks[{i}]: expected something that trains in it, got nothing")
        if seen & {id(one) for one in params}:
            raise ValueError(f"blocks[{i}]: expected parameters of its own, got some of another block's")
        seen |= {id(one) for one in params}
        found.append(params)
    return found
