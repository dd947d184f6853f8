"""A linear with a branch of any structure, in one y and one dX that both add to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.weight import QuantizedWeight
from . import _dispatch
from ._inputs import autocasts, cast, compute_dtype
from ._lora_function import output_like, rows_of
from .quantized_linear import quantized_linear


@dataclass(frozen=True)
class Branch:
    """What a structure adds to a linear: numbers, by which it is compared, and two functions of rows."""

    # Columns of y.
    out_features: int

    @property
    def wide(self) -> bool:
        """Whether its tensors keep their dtype, in which it computes."""
        return False

    @property
    def writes(self) -> bool:
        """Whether both functions take ``write``, to fill new memory and not add to what is there.

        That spares a pass over a new y or dX: the base product accumulates anyway.
        """
        return False

    @property
    def in_cpp(self) -> Any:
        """For eager calls on the CPU: an op of x, W, b and tensors, differentiated in C++, or ``None``."""
        return None

    def add_(self, y: Tensor, x: Tensor, *tensors: Any, **write: Any) -> tuple[Tensor | None, ...]:
        """Adds the branch for x ``[rows, in]`` into y; gives what the gradients read."""
        raise NotImplementedError

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, **write: Any
    ) -> Sequence[Tensor | None]:
        """Those of the tensors, by ``needs``; that of x is added into ``dx`` where there is one."""
        raise NotImplementedError


def branched_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    branch: Branch,
    tensors: Sequence[Tensor],
    x_branch: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + branch(x_branch or x); with no weight the branch alone

    x is ``[..., in]`` and y ``[..., out]``. Beside what the branch saves nothing is kept of x.

    Args:
        x: the input.
        weight: W ``[out, in]``, dense or quantised, or ``None``.
        bias: b ``[out]``, or ``None``.
        branch: what is added, see :class:`Branch`.
        tensors: what it computes with, cast to the dtype of x unless it is ``wide``.
        x_branch: what the branch reads, where that is not x: x after dropout.
    """
    if autocasts(x):
        dtype = compute_dtype(x)
        x, weight, bias, x_branch = (cast(t, dtype) for t in (x, weight, bias, x_branch))
    if not branch.wide:
        tensors = [t.to(x.dtype) if t.is_floating_point() else t for t in tensors]
    if isinstance(weight, QuantizedWeight) or _trains(weight) or _trains(bias):
        quantized = isinstance(weight, QuantizedWeight)
        base = quantized_linear(x, weight, bias) if quantized else F.linear(x, weight, bias)
        return base + branched_linear(x if x_branch is None else x_branch, None, None, branch, tensors)
    if _dispatch.transformed():
        return _transformable(x, weight, bias, branch, tensors, x_branch)
    if branch.in_cpp is not None and x_branch is None and _dispatch.eager_cpp(x, 1):
        return branch.in_cpp(x, weight, bias, *tensors)  # type: ignore[no-any-return]
    return _BranchedLinear.apply(branch, x, x_branch, weight, bias, *tensors)


def _trains(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _base(rows: Tensor, weight: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    if weight is not None:
        return F.linear(rows, weight, bias)
    y = rows.new_zeros(rows.shape[0], out_features)
    return y if bias is None else y + bias


def _transformable(
    x: Tensor, weight: Any, bias: Any, branch: Branch, tensors: Sequence[Tensor], x_branch: Tensor | None
) -> Tensor:
    """The same without a Function, for the transforms of ``torch.func``."""
    y = _base(rows_of(x), weight, bias, branch.out_features)
    read = x if x_branch is None else x_branch
    for one in (read, *tensors):  # what vmap maps over has to be in y before it is written to
        y = y + one.new_zeros((), dtype=y.dtype)
    branch.add_(y, rows_of(read), *tensors)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _BranchedLinear(torch.autograd.Function):
    """Saves W and what the branch saves."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # Without gradients torch.compile counts what is given against the names that stand here, and takes
        # the context away where both are as many: named beside ``*tensors``, two tensors were that.
        branch, x, x_branch, weight, bias, *tensors = given
        rows, branch_rows = rows_of(x), rows_of(x if x_branch is None else x_branch)
        if weight is not None and branch.writes:
            y = rows.new_empty(rows.shape[0], branch.out_features)
            saved = branch.add_(y, branch_rows, *tensors, write=True)
            y = y if bias is None else y.add_(bias)
            y.addmm_(rows, weight.T)
        else:
            y = _base(rows, weight, bias, branch.out_features)
            saved = branch.add_(y, branch_rows, *tensors)
        ctx.branch, ctx.in_features = branch, x.shape[-1]
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, *saved)
        return output_like(y, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        _, needs_x, needs_branch, _, _, *needs = ctx.needs_input_grad
        rows = rows_of(dy)
        shape = (*dy.shape[:-1], ctx.in_features)  # no -1, which no rows would leave open
        if needs_x and not needs_branch and weight is not None and ctx.branch.writes:
            dx = rows.new_empty(rows.shape[0], ctx.in_features)
            grads = ctx.branch.gradients(rows, dx, needs, *saved, write=True)
            return None, dx.addmm_(rows, weight).view(shape), None, None, None, *grads
        dx = branch_dx = None
        if needs_x:
            dx = _zeros(rows, ctx.in_features) if weight is None else rows @ weight
            branch_dx = dx
        if needs_branch:
            branch_dx = _zeros(rows, ctx.in_features)
        grads = ctx.branch.gradients(rows, branch_dx, needs, *saved)
        shaped = [None if d is None else d.view(shape) for d in (dx, branch_dx)]
        return None, shaped[0], shaped[1] if needs_branch else None, None, None, *grads


def _zeros(rows: Tensor, columns: int) -> Tensor:
    return rows.new_zeros(rows.shape[0], columns)
