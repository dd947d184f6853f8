"""Optimisers that were made before a model's parameters became others: said at their next step.

An optimiser holds parameters and not names. One that goes on with those that an adapter had before a file
of other shapes was loaded, or before the adapter was deleted, trains nothing, and one whose moments have
ranks that are no longer there is refused by torch in other words, or reads past their end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._messages import warn

_AGAIN = "make the optimiser again"
_notes: list[_Note] = []
_hooks: list[Any] = []


class _Note:
    """What became of some parameters, for the optimisers that hold any of them."""

    def __init__(self, about: Iterable[Tensor], tell: Callable[[Optimizer, set[int]], None]) -> None:
        self.about = [weakref.ref(parameter) for parameter in about]
        self.tell = tell

    def alive(self) -> set[int]:
        """The ids of those that somebody still holds."""
        return {id(one) for one in (reference() for reference in self.about) if one is not None}

    def forget(self, told: set[int]) -> None:
        """What is left is for other optimisers."""
        self.about = [one for one in self.about if id(one()) not in told]


class _Deleted(_Note):
    """Of parameters that nothing computes with any more."""

    def __init__(self, what: str, about: Iterable[Tensor]) -> None:
        super().__init__(about, self._tell)
        self.what = what

    def _tell(self, optimizer: Optimizer, held: set[int]) -> None:
        count = len(held & self.alive())
        warn(f"optimizer: it holds {count} parameters of {self.what}, which nothing computes with; {_AGAIN}")


def note_replaced(what: str, before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    """Has an optimiser of any parameter ``before`` warn where it steps without all of those ``after`` them.

    Both are those that train, or trained.
    """
    old, new = list(before), list(after)
    if not old or {id(one) for one in old} == {id(one) for one in new}:
        return
    references = [weakref.ref(one) for one in new]

    def tell(optimizer: Optimizer, held: set[int]) -> None:
        wanted = {id(one) for one in (reference() for reference in references) if one is not None}
        missed = len(wanted - held)
        if missed:
            warn(f"optimizer: {what} has {missed} parameters that it does not hold; {_AGAIN}")

    _add(_Note(old, tell))


def note_deleted(what: str, before: Iterable[Tensor], left: Iterable[Tensor]) -> None:
    """Has an optimiser of parameters ``before``, and not ``left`` in the model, warn that it holds them."""
    kept = {id(one) for one in left}
    gone = [one for one in before if id(one) not in kept]
    note = next((one for one in _notes if isinstance(one, _Deleted) and one.what == what), None)
    if note is not None:  # layer by layer
        note.about += [weakref.ref(one) for one in gone]
    elif gone:
        _add(_Deleted(what, gone))


def note_cut(what: str, parameter: nn.Parameter, before: torch.Size) -> None:
    """Has an optimiser whose moments of ``parameter`` have the shape ``before`` refuse its next step."""
    reference, after = weakref.ref(parameter), tuple(parameter.shape)

    def tell(optimizer: Optimizer, held: set[int]) -> None:
        state = optimizer.state.get(reference(), {})  # type: ignore[call-overload]
        if any(isinstance(one, Tensor) and one.shape == before for one in state.values()):
            raise RuntimeError(
                f"optimizer: expected moments of the shape {after} for {what}, got {tuple(before)}; give it"
                f" to compact(model, optimizer=optimizer), or {_AGAIN}"
            )

    _add(_Note([parameter], tell))


def _add(note: _Note) -> None:
    _notes.append(note)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Says what concerns this optimiser, and forgets what concerns none any more."""
    held = {id(one) for one in _parameters(optimizer)}
    for note in list(_notes):
        if note.alive() & held:
            note.tell(optimizer, held)
            note.forget(held)
        if not note.alive():
            _notes.remove(note)
    if not _notes:
        _hooks.pop().remove()


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
