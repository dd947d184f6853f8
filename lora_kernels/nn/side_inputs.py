"""Side inputs of a forward pass, at the level of a model; see :class:`lora_kernels.adapters.Call`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..adapters.call import Call, entered

_CHECKPOINT = "_gradient_checkpointing_func"  # where the modules of Transformers keep theirs


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
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    call = Call(inputs)
    with entered(call), _bound_checkpoints(model, call):
        yield call


@contextlib.contextmanager
def _bound_checkpoints(model: nn.Module, call: Call) -> Iterator[None]:
    """Inside the ``with`` block what the modules checkpoint runs with ``call`` the second time too."""
    before = {module: vars(module)[_CHECKPOINT] for module in model.modules() if _CHECKPOINT in vars(module)}
    for module, checkpoint in before.items():
        module.__dict__[_CHECKPOINT] = _bound(checkpoint, call)
    try:
        yield
    finally:
        for module, checkpoint in before.items():
            module.__dict__[_CHECKPOINT] = checkpoint


def _bound(checkpoint: Callable[..., Any], call: Call) -> Callable[..., Any]:
    return lambda function, *args, **kwargs: checkpoint(call.bind(function), *args, **kwargs)
