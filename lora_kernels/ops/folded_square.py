"""A small square matrix between a sum over groups of features and a repetition: MoRA's types 1 to 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class FoldedSquare(Branch):
    """y += Q M P x with 0/1 matrices P ``[width, in]`` and Q ``[out, width]``, never made

    Cyclic: feature j belongs to group j mod width, and P wraps round until every group has as many. Else
    groups are neighbours, the first ones longer by one. One pass over x and one over y, in
    which the base product then accumulates; P x ``[rows, width]`` and M are saved, x is not.
    """

    writes = True

    width: int
    cyclic_in: bool
    cyclic_out: bool

    def add_(self, y: Tensor, x: Tensor, square: Tensor, write: bool = False) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        folded = _sum(x, self.width, self.cyclic_in, wrap=True)
        _spread_(y, folded @ square.T, self.cyclic_out, write=write)
        return folded, square

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of M; P and Q change places."""
        folded, square = saved
        dv = _sum(dy, self.width, self.cyclic_out)
        if dx is not None:
            _spread_(dx, dv @ square, self.cyclic_in, wrap=True, write=write)
        return [dv.T @ folded if needs[0] else None]


@dataclass(frozen=True)
class FoldedColumns(Branch):
    """y += Dᵀ P x with D ``[width, out]`` and P as of a cyclic :class:`FoldedSquare` that does not wrap

    One pass over x and one over y, in which the base product then accumulates; P x and D are saved, x is not.
    """

    writes = True

    @property
    def in_cpp(self) -> Any:
        """csrc/cpu/thin_branch_autograd.cpp."""
        return torch.ops.lora_kernels.cpp_folded_linear_autograd.default

    def add_(self, y: Tensor, x: Tensor, columns: Tensor, write: bool = False) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        folded = _sum(x, len(columns), cyclic=True)
        y.addmm_(folded, columns, beta=0 if write else 1)
        return folded, columns

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of D."""
        folded, columns = saved
        if dx is not None:
            _spread_(dx, dy @ columns.T, cyclic=True, write=write)
        return [folded.T @ dy if needs[0] else None]


def _sum(x: Tensor, width: int, cyclic: bool, wrap: bool = False) -> Tensor:
    """[rows, width]: the sum over each group."""
    if not cyclic:
        return torch.cat([group.sum(-1) for group, _ in _groups(x, width)], 1)
    whole, rest = divmod(x.shape[1], width)
    folded = x[:, : whole * width].unflatten(1, (whole, width)).sum(1)
    if rest:
        folded[:, :rest] += x[:, whole * width :]
    for at, count in _wrapped(x.shape[1], width) if wrap else ():
        folded[:, at : at + count] += x[:, :count]
    return folded


def _spread_(y: Tensor, folded: Tensor, cyclic: bool, *, wrap: bool = False, write: bool = False) -> None:
    """Adds to each feature its group's value, or writes it: what :func:`_sum` is the transpose of."""
    width, put = folded.shape[1], Tensor.copy_ if write else Tensor.add_
    if not cyclic:
        for group, span in _groups(y, width):
            put(group, folded[:, span, None])
        return
    whole, rest = divmod(y.shape[1], width)
    put(y[:, : whole * width].unflatten(1, (whole, width)), folded[:, None])
    if rest:
        put(y[:, whole * width :], folded[:, :rest])
    for at, count in _wrapped(y.shape[1], width) if wrap else ():
        y[:, :count] += folded[:, at : at + count]


def _groups(x: Tensor, width: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, groups, features of a group], of the longer groups and of the others."""
    size, longer = divmod(x.shape[1], width)
    edge = longer * (size + 1)
    yield x[:, :edge].unflatten(1, (longer, size + 1)), slice(longer)
    yield x[:, edge:].unflatten(1, (width - longer, size)), slice(longer, None)


def _wrapped(length: int, width: int) -> Iterator[tuple[int, int]]:
    """The groups from `at` on that get the first `count` features once more."""
    at = width - (-length) % width
    while at < width:
        count = min(length, width - at)
        yield at, count
        at += count


def fold(x: Tensor, width: int) -> Tensor:
    """Σ_j x[..., i + j width] for i < width, differentiable by its parts."""
    whole, rest = divmod(x.shape[-1], width)
    folded = x[..., : whole * width].unflatten(-1, (whole, width)).sum(-2)
    return folded + F.pad(x[..., whole * width :], (0, width - rest)) if rest else folded
