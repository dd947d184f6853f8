"""Side inputs of a forward pass, at the level of a model; see :class:`lora_kernels.adapters.Call`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..adapters.call import Call, begin, elsewhere, end, entered

_CHECKPOINT = "_gradient_checkpointing_func"  # where the modules of Transformers keep theirs
_Checkpoints = dict[nn.Module, Callable[..., Any]]


@contextlib.contextmanager
def side_inputs(model: nn.Module, **inputs: Any) -> Iterator[Call]:
    """Inside the ``with`` block the adapters of ``model`` see ``inputs``: a task, a scale for each token, …

    The block holds for every thread, one at a time, and ``torch.compile`` traces what it gives. The backward
    pass may come after the block, also where a Transformers model checkpoints its activations; what you give
    to :func:`torch.utils.checkpoint.checkpoint` yourself, give as ``call.bind(function)``.

    Args:
        model: the model that will run.
        inputs: by the names that the methods read.

    Yields:
        The :class:`lora_kernels.adapters.Call`.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a block of another thread is open.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> with side_inputs(model, task=1) as call:
        ...     y = model(torch.randn(3, 4))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    call = Call(inputs)
    with entered(call), _bound_checkpoints(model, call):
        yield call


@contextlib.contextmanager
def _bound_checkpoints(model: nn.Module, call: Call) -> Iterator[None]:
    """Inside the ``with`` block what the modules checkpoint runs with ``call`` the second time too."""
    before = _bind_checkpoints(model, call)
    try:
        yield
    finally:
        _restore_checkpoints(before)


def _bind_checkpoints(model: nn.Module, call: Call) -> _Checkpoints:
    before = {module: vars(module)[_CHECKPOINT] for module in model.modules() if _CHECKPOINT in vars(module)}
    for module, checkpoint in before.items():
        module.__dict__[_CHECKPOINT] = _bound(checkpoint, call)
    return before


def _restore_checkpoints(before: _Checkpoints) -> None:
    for module, checkpoint in before.items():
        module.__dict__[_CHECKPOINT] = checkpoint


def _bound(checkpoint: Callable[..., Any], call: Call) -> Callable[..., Any]:
    return lambda function, *args, **kwargs: checkpoint(call.bind(function), *args, **kwargs)


class _OwnCall:
    """The forward hooks of a model whose layers pass values on: a call for each forward pass.

    In a block of :func:`side_inputs` that is the block's.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.checkpoints: _Checkpoints = {}

    def __call__(self, module: nn.Module, args: object) -> None:
        self.close()  # what an interrupted forward left behind
        self.call = begin()  # which refuses what another thread has open
        if self.call is not None and module.training and not torch.compiler.is_compiling():
            self.checkpoints = _bind_checkpoints(module, self.call)

    def close(self, *args: object) -> None:
        """The hook behind the forward, called after an exception too."""
        if self.call is not None and not elsewhere():
            end(self.call)
            self.call = None
            if self.checkpoints:
                _restore_checkpoints(self.checkpoints)
                self.checkpoints = {}

    def __deepcopy__(self, memo: object) -> _OwnCall:
        return _OwnCall()


def open_calls(model: nn.Module, flag: bool) -> None:
    """Lets each forward pass of ``model`` open a call of its own where none is in force, or no longer."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if _OwnCall in (type(hook), type(getattr(hook, "__self__", None))):
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)
    if flag:
        own = _OwnCall()
        model.register_forward_pre_hook(own)
        model.register_forward_hook(own.close, always_call=True)
