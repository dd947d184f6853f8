"""Runs an op on the backend that suits its tensors.

Eager calls on plain tensors go straight to the backend's function: an op's dispatch in Python costs
about as much as a small matmul. Tracers, fake tensors and other subclasses go through the opaque op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _backend, _ops

_PLAIN = (Tensor, Parameter)
# Where each op keeps lora_a, whose first dimension is the rank.
_LORA_A = {"lora_linear": 2, "lora_linear_backward": 3}


def _choose(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    lead = args[0]
    if op not in _LORA_A:  # a mask: any backend of the device will do
        name = _backend.resolve(lead.device.type, torch.float32, 1)
    elif lead.shape[0] == 0:  # nothing to launch a kernel for
        name = "reference"
    else:
        name = _backend.resolve(lead.device.type, lead.dtype, args[_LORA_A[op]].shape[0])
    return _backend.implementation(name, op)


def call(op: str, *args: Any) -> Any:
    """Computes ``op`` of ``_ops.py`` with ``args``."""
    if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN:
        return getattr(torch.ops.lora_kernels, op).default(*args)
    return _choose(op, args)(*args)


def eager_cpp(x: Tensor, rank: int) -> bool:
    """Whether an eager call on ``x`` runs in C++, autograd included."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and _backend.resolve(x.device.type, x.dtype, rank) == "cpp"
    )


def draw_seed(like: Tensor) -> Tensor:
    """One int64 from torch's generator of the device of ``like``, left on that device."""
    if torch.compiler.is_compiling() or type(like) not in _PLAIN:
        return torch.ops.lora_kernels.dropout_seed.default(like)
    return _dropout_seed(like)


def _dropout_seed(like: Tensor) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=like.device).random_()


def _kernel(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return _choose(op, args)(*args)

    return run


for _op in _ops.SCHEMAS:
    _ops.register(_op, _dropout_seed if _op == "dropout_seed" else _kernel(_op))
