"""One forward's side inputs: what a method's ``lower`` reads beside x."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Call(dict[str, Any]):
    """Side inputs by name: a task, a scale for each token, factors that a network made.

    A layer may also write what a later one reads, in the same forward pass. Missing ones are an error that
    names them.
    """

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"call: expected {key!r}, which an active adapter reads, got"
            f" {', '.join(map(repr, self)) or 'nothing'}; run the model inside"
            f" lora_kernels.nn.side_inputs(model, {key}=...)"
        )

    def note(self, key: str, at: str, value: Any) -> None:
        """Keeps what a layer found on its way, for whoever opened the block; without a block nobody asks."""
        self.setdefault(key, {})[at] = value

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with these side inputs whenever it runs: what to give to ``checkpoint``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with entered(self):
                return function(*args, **kwargs)

        return run


class _Nothing(Call):
    def note(self, key: str, at: str, value: Any) -> None:
        return None

    def __setitem__(self, key: str, value: Any) -> None:
        raise ValueError(
            f"call: {key!r} is passed from layer to layer, and no call is open: run the model that apply_lora"
            " got, a part of it inside lora_kernels.nn.side_inputs(model), and give torch.utils.checkpoint"
            " current_call().bind(function)"
        )


_NOTHING = _Nothing()
_OTHER_THREAD = "call: the side inputs of another thread are in force; one forward pass at a time"


class _State:
    """What is in force. A plain object, so that ``torch.compile`` reads it with a guard: of what a thread or
    a context holds it would take the value that it saw first.
    """

    call: Call = _NOTHING
    owner: threading.Thread | None = None


_state = _State()
# Of two threads that both see that nothing is in force only one may go on.
_taking = threading.Lock()


def current_call() -> Call:
    """The side inputs in force; empty outside of any block.

    Examples:
        >>> current_call()
        {}
    """
    return _state.call


@contextlib.contextmanager
def entered(call: Call) -> Iterator[Call]:
    """Inside the ``with`` block ``call`` is in force, for every thread.

    Raises:
        RuntimeError: a block of another thread is open.
    """
    with _taking:
        _refuse_others()
        before = (_state.call, _state.owner)
        _state.call, _state.owner = call, threading.current_thread()
    try:
        yield call
    finally:
        _state.call, _state.owner = before


def begin() -> Call | None:
    """Puts a new call in force and returns it, or ``None`` where one is: who begins calls :func:`end`.

    Raises:
        RuntimeError: a block of another thread is open.
    """
    if torch.compiler.is_compiling():
        return _begun(None)
    with _taking:
        _refuse_others()
        return _begun(threading.current_thread())


def _begun(thread: threading.Thread | None) -> Call | None:
    if _state.call is not _NOTHING:
        return None
    _state.call, _state.owner = Call(), thread
    return _state.call


def end(call: Call) -> None:
    """Takes a call of :func:`begin` out of force, if it is."""
    if _state.call is call:
        _state.call, _state.owner = _NOTHING, None


def elsewhere() -> bool:
    """Whether what is in force is that of another thread, which goes on with it."""
    if torch.compiler.is_compiling() or _state.owner is None:
        return False
    return _state.owner is not threading.current_thread() and _state.owner.is_alive()


def _refuse_others() -> None:
    if elsewhere():
        raise RuntimeError(_OTHER_THREAD)


def expand_rows(value: Tensor, x: Tensor) -> Tensor:
    """A side input with one value for each sample or row of x, as a gate ``[..., 1]``."""
    while value.dim() < x.dim():
        value = value[..., None]
    return value
