"""Pairs of features, each turned by a 2 × 2 matrix of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._lora_function import output_like, rows_of


def turned_pairs(x: Tensor, diagonal: Tensor, beside: Tensor, group: int) -> Tensor:
    """y_i = c_i x_i - s_i x_j and y_j = c_j x_j + s_j x_i, j = i + group / 2

    x is ``[..., n]``; the pairs are the features i and j of each group, i in its first half. Three passes
    forward, seven backward; x is saved.

    Args:
        x: the features.
        diagonal: c ``[n]``.
        beside: s ``[n]``.
        group: how many neighbours make a group, an even divisor of n.

    Raises:
        ValueError: group does not divide n into even groups, or c or s is no ``[n]``.

    Examples:
        >>> x, c, s = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.zeros(4), torch.ones(4)
        >>> turned_pairs(x, c, s, 2)
        tensor([0., 1., 0., 2.])
    """
    width = x.shape[-1]
    if group < 2 or group % 2 or width % group:
        raise ValueError(f"group: expected an even divisor of {width}, the features of x, got {group}")
    for name, column in (("diagonal", diagonal), ("beside", beside)):
        if column.shape != (width,):
            raise ValueError(f"{name}: expected [{width}] for the features of x, got {tuple(column.shape)}")
    if _dispatch.transformed():
        return _composed(x, diagonal, beside, group)
    return _TurnedPairs.apply(x, diagonal, beside, group)  # type: ignore[no-any-return]


def _composed(x: Tensor, diagonal: Tensor, beside: Tensor, group: int) -> Tensor:
    return x * diagonal + _halves(x, group).roll(1, -2).flatten(-3) * _signed(beside, group)


def _halves(tensor: Tensor, group: int) -> Tensor:
    """A view ``[..., groups, 2, group / 2]``."""
    return tensor.unflatten(-1, (-1, 2, group // 2))


def _swapped(tensor: Tensor, group: int) -> Tensor:
    """New memory with each feature in the place of the other one of its pair."""
    swapped = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    (first, second), (to_first, to_second) = (_halves(t, group).unbind(-2) for t in (tensor, swapped))
    to_first.copy_(second)
    to_second.copy_(first)
    return swapped


def _signed(beside: Tensor, group: int) -> Tensor:
    """-s_i and s_j."""
    first, second = _halves(beside, group).unbind(-2)
    return torch.stack([-first, second], -2).flatten(-3)


class _TurnedPairs(torch.autograd.Function):
    """Saves x. New memory takes longer than what is computed in it, so that what is there is written over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, diagonal: Tensor, beside: Tensor, group: int) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x, diagonal, beside)
        rows: Any = rows_of(x)
        y = _swapped(rows, group).mul_(_signed(beside, group)).addcmul_(rows, diagonal)
        return output_like(y, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, diagonal, beside = ctx.saved_tensors
        rows: Any = rows_of(dy)
        given, swapped = rows_of(x), _swapped(rows, ctx.group)
        product = torch.mul(swapped, given)
        across = _swapped(product.sum(0), ctx.group)
        d_diagonal = torch.mul(rows, given, out=product).sum(0)
        dx = swapped.mul_(_swapped(_signed(beside, ctx.group), ctx.group)).addcmul_(rows, diagonal)
        return dx.view(dy.shape), d_diagonal, _signed(across, ctx.group), None
