"""The pages of one linear: every resident adapter's A rows and B columns, of any rank, with no padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.adapter_stack import AdapterStack


class PageTable:
    """Fixed storage for ``pages`` pages of a linear ``[out, in]``, and which slot owns which.

    Addresses never change, so a captured CUDA graph sees every later adapter. A slot that owns nothing is an
    adapter of rank 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pages: int,
        slots: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.a_pages = torch.zeros(pages, in_features, dtype=dtype, device=device)
        self.b_pages = torch.zeros(pages, out_features, dtype=dtype, device=device)
        self._owned: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(pages))
        # A slot's list has a place of its own, so that a change of one slot is no change of another.
        self.pages = torch.zeros(slots * max_rank, dtype=torch.int32, device=device)
        first = torch.arange(slots, dtype=torch.int32) * max_rank
        self.spans = torch.stack([first, torch.zeros_like(first)], 1).to(device)
        self.scalings = torch.zeros(slots, dtype=torch.float32, device=device)
        self.max_rank = max_rank

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    def take(self, slot: int, rank: int) -> None:
        """Gives ``rank`` pages to ``slot``; the caller knows that they are there."""
        # In order, so that pages that are next to each other are one block.
        self._owned[slot] = sorted(self._free.pop() for _ in range(rank))

    def give_back(self, slot: int) -> None:
        """Frees the pages of ``slot``."""
        self._free += self._owned[slot]
        self._owned[slot] = []

    def write(self, slot: int, lora_a: Tensor, b_columns: Tensor, scaling: float) -> None:
        """Copies an adapter (A ``[r, in]`` and Bᵀ ``[r, out]``) into the pages of ``slot`` and lists them."""
        owned = torch.tensor(self._owned[slot], dtype=torch.int32)
        index = owned.to(self.a_pages.device)
        self.a_pages.index_copy_(0, index.long(), lora_a)
        self.b_pages.index_copy_(0, index.long(), b_columns)
        self.pages[slot * self.max_rank :][: len(owned)] = index
        self.spans[slot, 1] = len(owned)
        self.scalings[slot] = scaling

    def overwrite(self, slot: int, lora_a: Tensor, lora_b: Tensor, scaling: float | None) -> None:
        """Puts another A ``[r, in]`` and B ``[out, r]`` of the same rank into the pages of ``slot``.

        No list of pages changes, and without a ``scaling`` no scale.
        """
        for pages, rows in self._blocks(slot):
            self.a_pages[pages].copy_(lora_a[rows], non_blocking=True)
            self.b_pages[pages].T.copy_(lora_b[:, rows], non_blocking=True)
        if scaling is not None:
            self.scalings[slot] = scaling

    def read(self, slot: int, lora_a: Tensor, b_columns: Tensor) -> None:
        """Copies the adapter of ``slot`` out, as :meth:`write` takes it."""
        for pages, rows in self._blocks(slot):
            lora_a[rows].copy_(self.a_pages[pages])
            b_columns[rows].copy_(self.b_pages[pages])

    def _blocks(self, slot: int) -> Iterator[tuple[slice, slice]]:
        """The pages of ``slot`` as runs, and the ranks that lie there."""
        owned, first = self._owned[slot], 0
        for i in range(1, len(owned) + 1):
            if i == len(owned) or owned[i] != owned[i - 1] + 1:
                yield slice(owned[first], owned[i - 1] + 1), slice(first, i)
                first = i

    def clear(self, slot: int) -> None:
        """Makes ``slot`` an adapter of rank 0: one that leaves this linear alone."""
        self.spans[slot, 1] = 0

    def stack(self) -> AdapterStack:
        """The slots as :func:`multi_lora_linear` takes them; it stays valid as adapters come and go."""
        tensors = (self.a_pages, self.b_pages, self.pages, self.spans, self.scalings)
        return AdapterStack(*tensors, self.max_rank)
