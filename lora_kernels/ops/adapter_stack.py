"""Many adapters of one linear, or of linears that share x, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._ops import TABLE_WIDTH


@dataclass(frozen=True)
class AdapterStack:
    """Adapters in two matrices: a page is one rank row of an A with its column of B, whatever the rank.

    Adapter i, with ``first, rank = spans[i]``, owns ``pages[first:first + rank]``, in any order and place;
    no page has two owners. Differentiable in ``a_pages``, ``b_pages`` and ``scalings``.

    Args:
        a_pages: ``[P, K]``, rows of every A.
        b_pages: ``[P, N]``, columns of every B.
        pages: int32 ``[T]``.
        spans: int32 ``[D, 2]``.
        scalings: float32 ``[D]``.
        max_rank: the widest rank among the D adapters.

    Examples:
        >>> stack = stack_adapters([torch.randn(2, 8)], [torch.randn(4, 2)])
        >>> stack.max_rank
        2
    """

    a_pages: Tensor
    b_pages: Tensor
    pages: Tensor
    spans: Tensor
    scalings: Tensor
    max_rank: int

    def __len__(self) -> int:
        """The number of adapters, D."""
        return self.spans.shape[0]

    @cached_property
    def _linears(self) -> tuple[tuple[Any, ...]]:
        """The only linear's, as :attr:`AdapterSlices._linears` has those of several."""
        return ((self.a_pages, self.b_pages, self.pages, self.spans, self.scalings, self.max_rank),)


def stack_adapters(
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scalings: Sequence[float] | Tensor | float = 1.0
) -> AdapterStack:
    """Puts adapters of any ranks side by side; gradients flow back to each A, B and scaling.

    Args:
        lora_as: one ``[r_i, K]`` an adapter; the ranks may differ, and be 0.
        lora_bs: one ``[N, r_i]`` an adapter.
        scalings: s for all, or one an adapter.

    Raises:
        ValueError: no adapter, or shapes that do not fit each other; the message names which.

    Examples:
        >>> stack = stack_adapters([torch.randn(r, 8) for r in (2, 3)], [torch.randn(4, r) for r in (2, 3)])
        >>> stack.spans
        tensor([[0, 2],
                [2, 3]], dtype=torch.int32)
    """
    ranks = _check_factors(lora_as, lora_bs)
    device = lora_as[0].device
    if not isinstance(scalings, Tensor):
        many = [float(scalings)] * len(ranks) if isinstance(scalings, (int, float)) else list(scalings)
        scalings = torch.tensor(many, dtype=torch.float32, device=device)
    if scalings.shape != (len(ranks),):
        raise ValueError(
            f"scalings: expected one for each of {len(ranks)}, got shape {tuple(scalings.shape)}"
        )
    widths = torch.tensor(ranks, dtype=torch.int32)
    spans = torch.stack([widths.cumsum(0).int() - widths, widths], 1).to(device)
    pages = torch.arange(sum(ranks), dtype=torch.int32, device=device)
    return AdapterStack(
        torch.cat(list(lora_as)), torch.cat([b.T for b in lora_bs]), pages, spans, scalings, max(ranks)
    )


def _check_factors(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> list[int]:
    """The ranks."""
    if not lora_as or len(lora_as) != len(lora_bs):
        raise ValueError(
            f"lora_bs: expected as many as lora_as, at least one, got {len(lora_bs)} for {len(lora_as)}"
        )
    cols, out = lora_as[0].shape[-1], lora_bs[0].shape[0]
    for i, (a, b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        if a.dim() != 2 or a.shape[1] != cols:
            raise ValueError(f"lora_as[{i}]: expected shape [r, {cols}], got {tuple(a.shape)}")
        if b.shape != (out, a.shape[0]):
            raise ValueError(f"lora_bs[{i}]: expected shape {(out, a.shape[0])}, got {tuple(b.shape)}")
    return [a.shape[0] for a in lora_as]


@dataclass(frozen=True)
class AdapterSlices:
    """Linears that share x (query, key and value; gate and up), each with its stack of the same D adapters.

    Of :func:`slice_adapters`. Ranks may differ between the linears, and be 0 where an adapter leaves one out.

    Examples:
        >>> stack = stack_adapters([torch.randn(2, 8)], [torch.randn(4, 2)])
        >>> slices = slice_adapters(stack, stack)
    """

    stacks: tuple[AdapterStack, ...]
    table: Tensor | None

    @property
    def widths(self) -> list[int]:
        """The out features of each linear."""
        return [stack.b_pages.shape[1] for stack in self.stacks]

    @property
    def max_rank(self) -> int:
        """The widest rank of all."""
        return max(stack.max_rank for stack in self.stacks)

    def __len__(self) -> int:
        """The number of adapters, D."""
        return len(self.stacks[0])

    @cached_property
    def _linears(self) -> tuple[tuple[Any, ...], ...]:
        """What each linear's stack has, as a direct call into C++ reads it."""
        return tuple(stack._linears[0] for stack in self.stacks)


def slice_adapters(*stacks: AdapterStack) -> AdapterSlices:
    """Stacks of linears that share x, to be served in one pair of launches.

    The slices hold the addresses of the stacks: what is written into their tensors later counts.

    Raises:
        TypeError: not a stack.
        ValueError: none, or they differ in K, in the number of adapters, in dtype or in device.

    Examples:
        >>> stack = stack_adapters([torch.randn(2, 8)], [torch.randn(4, 2)])
        >>> slices = slice_adapters(stack, stack)
    """
    for stack in stacks:
        if not isinstance(stack, AdapterStack):
            raise TypeError(f"stacks: expected AdapterStacks, got {type(stack).__name__}")
    kinds = [(s.a_pages.shape[1], len(s), s.a_pages.dtype, s.b_pages.dtype, s.a_pages.device) for s in stacks]
    if len(set(kinds)) != 1:
        raise ValueError(f"stacks: expected at least one, alike in (K, D, dtypes, device), got {kinds}")
    table = None if len(stacks) == 1 else torch.tensor(_table_rows(stacks), device=stacks[0].a_pages.device)
    return AdapterSlices(stacks, table)


def _table_rows(stacks: Sequence[AdapterStack]) -> list[list[int]]:
    rows, first = [], 0
    for s in stacks:
        tensors = (s.a_pages, s.b_pages, s.pages, s.spans, s.scalings)
        sizes = (s.a_pages.stride(0), s.b_pages.stride(0), s.b_pages.shape[1], first)
        rows.append([*(t.data_ptr() for t in tensors), *sizes])
        first += s.b_pages.shape[1]
    assert all(len(row) == TABLE_WIDTH for row in rows)
    return rows
