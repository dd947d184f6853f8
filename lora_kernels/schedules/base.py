"""What happens between the steps of an optimiser: the one protocol of all schedules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim._common import check_keys


class Schedule:
    """Acts between the steps of an optimiser: call :meth:`step` after each of them.

    A subclass writes :meth:`act`, which raises before it changes anything, and names in ``saved`` the
    attributes that a checkpoint needs: numbers, tensors, generators, optimisers, and dicts and lists of
    those. What the constructor was given is not saved: build the schedule anew as it was, on the model as it
    was saved, then :meth:`load_state_dict`.

    Args:
        model: one of :func:`apply_lora` or of PEFT; a schedule says what it needs of it.
        optimizer: the one whose steps are counted, for schedules that read or change its state. Under the
            Transformers Trainer, which makes its own, leave it to :func:`as_callback`.
    """

    # Its key in the register, which a checkpoint holds.
    key: ClassVar[str]
    saved: ClassVar[tuple[str, ...]] = ()
    # Whether it needs the optimiser.
    with_optimizer: ClassVar[bool] = False
    # Whether it changes base weights, which a checkpoint of adapters alone would lose.
    moves_base: ClassVar[bool] = False

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch optimiser, got {type(optimizer).__name__}")
        self.model, self.optimizer = model, optimizer
        self.steps = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not isinstance(cls.saved, (tuple, list)) or not all(isinstance(one, str) for one in cls.saved):
            raise TypeError(f"saved: {cls.__name__} expected a tuple of names, got {cls.saved!r}")

    def __getattr__(self, name: str) -> Any:
        """Only of what is not there: of the class, or because its ``__init__`` did not call this one's."""
        kind = type(self).__name__
        if name == "key":
            raise AttributeError(
                f"key: expected a name on the class {kind}, key = '…', which checkpoints hold"
            )
        if name in ("model", "optimizer", "steps"):
            raise AttributeError(f"{kind}: call super().__init__(model, optimizer) in its __init__")
        if name in self.saved:
            raise AttributeError(f"saved: expected names of attributes of {kind}, got {name!r}")
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    def act(self, step: int) -> None:
        """What to do after the optimiser's step number ``step``, counted from 1."""
        raise NotImplementedError(f"{type(self).__name__}: act")

    @torch.no_grad()
    def step(self) -> None:
        """Counts a step of the optimiser, and acts where one is due.

        Raises:
            ValueError: the schedule needs an optimiser and has none; nothing is changed.
        """
        if self.with_optimizer and self.optimizer is None:
            raise ValueError(f"optimizer: {self.key} expected the one that trains the model, got None")
        self.act(self.steps + 1)
        self.steps += 1

    def restored(self) -> None:
        """Called once a state is loaded, to bring the model in line with it."""

    def state_dict(self) -> dict[str, Any]:
        """Copies of what a checkpoint needs, which ``torch.save`` and ``weights_only=True`` take."""
        own = {name: _copied(name, getattr(self, name)) for name in ("steps", *self.saved)}
        return {"schedule": self.key, **own}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where :meth:`state_dict` was called.

        Raises:
            TypeError: no mapping.
            ValueError: the state of another schedule, or of this one on another model; nothing is changed.
        """
        if isinstance(state, Mapping) and state.get("schedule") != self.key:
            raise ValueError(f"state: expected one of {self.key!r}, got one of {state.get('schedule')!r}")
        names = ("steps", *self.saved)
        check_keys("state", ("schedule", *names), state)
        for name in names:
            self.check_state(name, getattr(self, name), state[name])
        for name in names:
            setattr(self, name, _taken(getattr(self, name), state[name]))
        self.restored()

    def check_state(self, name: str, own: Any, given: Any) -> None:
        """Raises where ``given`` cannot take the place of the attribute ``name``, which is ``own``."""
        check_alike(f"state[{name!r}]", own, given)


def check_alike(name: str, own: Any, given: Any) -> None:
    """Raises where two states differ in kind, in keys or in the shapes of tensors; lists may in length."""
    if isinstance(own, dict) and isinstance(given, Mapping):
        check_keys(name, own.keys(), given)
        for key, value in own.items():
            check_alike(f"{name}[{key!r}]", value, given[key])
    elif isinstance(own, Tensor) and isinstance(given, Tensor):
        if own.shape != given.shape:
            raise ValueError(f"{name}: expected the shape {tuple(own.shape)}, got {tuple(given.shape)}")
    elif not isinstance(given, _kinds(own)):
        raise ValueError(f"{name}: expected {type(own).__name__}, got {type(given).__name__}")
    elif isinstance(own, Optimizer):
        _check_optimizer(name, own, given)


def _check_optimizer(name: str, own: Optimizer, given: Any) -> None:
    """Raises where a state is of other parameters than the optimiser's; torch itself compares no shapes."""
    params = [one for group in own.param_groups for one in group["params"]]
    places = [one for group in given.get("param_groups", ()) for one in group["params"]]
    if len(places) != len(params):
        raise ValueError(f"{name}: expected a state of {len(params)} parameters, got one of {len(places)}")
    for place, parameter in zip(places, params, strict=True):
        for key, value in given.get("state", {}).get(place, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                want, got = tuple(parameter.shape), tuple(value.shape)
                raise ValueError(f"{name}: expected {key} of the shape {want}, got {got}")


def _kinds(own: Any) -> tuple[type, ...]:
    if isinstance(own, torch.Generator):
        return (Tensor,)
    if isinstance(own, Optimizer):
        return (Mapping,)
    return (int, float) if isinstance(own, (int, float)) else (type(own),)


def _copied(name: str, value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Optimizer):
        return copy.deepcopy(value.state_dict())
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(f"{name}[{key!r}]", one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(name, one) for one in value) if type(value) in (list, tuple) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"saved: expected numbers, tensors, generators, optimisers, and dicts and lists of those, got"
        f" {name!r}, a {type(value).__name__}"
    )


def _taken(own: Any, given: Any) -> Any:
    """``given`` as the new value of an attribute: on the device and in the dtype of the old one."""
    if isinstance(own, torch.Generator):
        own.set_state(given.cpu())
        return own
    if isinstance(own, Optimizer):
        own.load_state_dict(given)
        return own
    if isinstance(own, Tensor):
        return given.detach().to(own.device, own.dtype, copy=True)
    if isinstance(own, dict):
        return {key: _taken(one, given[key]) for key, one in own.items()}
    return _copied("state", given)
