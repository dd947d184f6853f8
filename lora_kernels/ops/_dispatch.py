"""Runs an op on the backend that suits its tensors.

Eager calls on plain tensors go straight to the backend's function: an op's dispatch in Python costs
about as much as a small matmul. Tracers, fake tensors and other subclasses go through the opaque op.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _backend, _extension, _ops
from . import _decode

_PLAIN = (Tensor, Parameter)
_Rank = tuple[str, Callable[[Any], int]]
# The argument that tells the rank an op works with, and how.
_A: _Rank = ("lora_a", lambda a: a.shape[0])
_WIDEST: _Rank = ("lora_as", lambda factors: max(a.shape[0] for a in factors))
_GIVEN: _Rank = ("max_rank", int)
_RANKS: dict[str, _Rank] = {
    "lora_linear": _A,
    "lora_linear_backward": _A,
    "low_rank_norm": _A,
    "dora_linear": _A,
    "dora_linear_backward": _A,
    "quantized_lora_linear": _A,
    "multi_lora_linear": _GIVEN,
    "multi_lora_linear_backward": _GIVEN,
    "multi_lora_linear_add": _GIVEN,
    # A stack's ranks: an A has them as rows, a B as columns.
    "stacked_lora_shrink": ("lora_a", lambda stacks: stacks[0].shape[-2]),
    "stacked_lora_expand": ("lora_b", lambda stacks: stacks[0].shape[-1]),
    "stacked_lora_linear": ("lora_b", lambda stacks: stacks[0].shape[-1]),
    # Of experts: [E, r, K].
    "grouped_lora_linear": ("lora_a", lambda a: a.shape[1]),
    "grouped_lora_linear_backward": ("lora_a", lambda a: a.shape[1]),
    "lora_linear_group": _WIDEST,
    "lora_linear_group_backward": _WIDEST,
}
_RANKLESS = (
    *("invariant_linear", "glu", "glu_backward", "quantized_linear"),
    *("gate_chain", "gate_chain_backward"),
)
# Masks and plans: any backend of the device will do, by a dtype that all take.
_DTYPELESS = ("dropout_seed", "dropout_mask", "row_dropout_mask", "batch_plan")


def _rank_reader(op: str) -> Callable[[tuple[Any, ...]], int]:
    """What tells the rank from the op's arguments, found by their names in its schema.

    Raises:
        NotImplementedError: nothing here says of which argument.
    """
    if op in _RANKLESS:
        return lambda args: 1
    if op not in _RANKS:
        raise NotImplementedError(f"{op}: name the argument that has its rank in _RANKS")
    name, rank = _RANKS[op]
    arguments = getattr(torch.ops.lora_kernels, op).default._schema.arguments
    place = [argument.name for argument in arguments].index(name)
    return lambda args: rank(args[place])


_READERS = {
    op: _rank_reader(op)
    for op in (*_ops.SCHEMAS, *_ops.IN_PLACE)
    if op not in _DTYPELESS and op != "dequantize"  # which is of the dtype that is asked for
}


def _lead(args: tuple[Any, ...]) -> Tensor:
    """The tensor whose kind decides: the first argument, or the first of its list."""
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def _opaque(lead: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(lead) not in _PLAIN


def _choose(op: str, args: tuple[Any, ...]) -> str:
    lead = _lead(args)
    if op == "dequantize":
        return _backend.resolve(lead.device.type, args[-1], 1)
    if op in _DTYPELESS:
        return _backend.resolve(lead.device.type, torch.float16, 1)
    if lead.shape[0] == 0:  # nothing to launch a kernel for
        return "reference"
    active = _backend.active_backend()
    if active == "cuda" or (active == "auto" and op in _ops.CUDA_OPS and lead.device.type == "cuda"):
        reason = _decode.misfit(op, args)
        if reason is None:
            return "cuda"
        if active == "cuda":
            raise _backend.BackendError(f"backend 'cuda' cannot run: {reason}")
    return _backend.resolve(lead.device.type, lead.dtype, _READERS[op](args))


def chosen(op: str, *args: Any) -> str | None:
    """The backend that computes ``op`` now, or ``None`` where the opaque op finds out when it runs."""
    return None if _opaque(_lead(args)) else _choose(op, args)


def call(op: str, *args: Any, backend: str | None = None) -> Any:
    """Computes ``op`` of ``_ops.py`` with ``args``, on ``backend`` where that was chosen before."""
    if _opaque(_lead(args)):
        return getattr(torch.ops.lora_kernels, op).default(*args)
    return _backend.implementation(backend or _choose(op, args), op)(*args)


def sharded(*tensors: Tensor) -> bool:
    """Whether any is a DTensor; told without importing ``torch.distributed.tensor``."""
    # No generator: it takes a microsecond of every call.
    for tensor in tensors:  # noqa: SIM110
        if type(tensor) not in _PLAIN and type(tensor).__name__ == "DTensor":
            return True
    return False


def transformed() -> bool:
    """Whether ``torch.func`` (grad, vmap, jvp, …) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """For an op whose sums by groups of rows no transform sees through.

    Raises:
        NotImplementedError: one is at work; a tangent would be lost without a word.
    """
    if transformed():
        raise NotImplementedError(
            f"{op}: expected plain tensors, got those of torch.func or of forward-mode differentiation, which"
            " mixed batches and mixtures of experts do not support"
        )


def fused_decode(x: Tensor, weight: Tensor | None, bias: Tensor | None, layout: tuple[Any, ...]) -> Any:
    """Base product and delta in one launch, or ``None`` where none fits."""
    return None if _opaque(x) else _decode.fused(x, weight, bias, layout)


def eager_cpp(x: Tensor, rank: int) -> bool:
    """Whether an eager call on ``x`` runs in C++, autograd included."""
    return not _opaque(x) and _backend.resolve(x.device.type, x.dtype, rank) == "cpp"


def direct(*call: Any) -> Any:
    """y of x, W, A, B, b, g, s and p on the CPU, autograd included, past all that is asked elsewhere.

    ``None`` where more than the arithmetic is to be done (csrc/cpu/direct_call.h), errors among it.
    """
    native = short_way("lora_linear")
    return None if native is None else native(*call)


def short_way(name: str) -> Callable[..., Any] | None:
    """The function of csrc/cpu/direct_call.h, for calls that ask for arithmetic alone, where it runs."""
    if torch.compiler.is_compiling() or _backend.active_backend() not in ("auto", "cpp"):
        return None
    return _native(name)


@functools.cache
def _native(name: str) -> Callable[..., Any] | None:
    return None if _extension.load() else getattr(importlib.import_module("lora_kernels._C"), name)


def draw_seed(like: Tensor) -> Tensor:
    """One int64 from torch's generator of the device of ``like``, left on that device."""
    if _opaque(like):
        # Its argument is new memory: a compiler that finds equal expressions never takes two of those for
        # one, but would make one draw, so one mask, of all that share an x.
        fresh = torch.empty(0, dtype=like.dtype, device=like.device)
        return torch.ops.lora_kernels.dropout_seed.default(fresh)
    return _dropout_seed(like)


def _dropout_seed(like: Tensor) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=like.device).random_()


def _kernel(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return _backend.implementation(_choose(op, args), op)(*args)

    return run


for _op in (*_ops.SCHEMAS, *_ops.IN_PLACE):
    _ops.register(_op, _dropout_seed if _op == "dropout_seed" else _kernel(_op))
