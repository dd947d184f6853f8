"""An adapter on the host: all its factors in one blob, once they were checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What an adapter takes besides pages, beside the names of linears.
SLOT = None
# A [r, in] and B [out, r].
Factors = tuple[Tensor, Tensor]


@dataclass
class HostAdapter:
    """Every A and Bᵀ in one blob, where each linear's part lies in it, and where it is on the device."""

    blob: Tensor
    parts: dict[str, tuple[int, int]]  # linear -> (first element, rank)
    scalings: dict[str, float]
    slot: int | None = None
    users: int = 0
    pinned: bool = False
    ready: torch.cuda.Event | None = field(default=None, repr=False)
    # Whether the pages have what the blob has not yet.
    stale: bool = False

    @property
    def size(self) -> Counter[str | None]:
        """How many pages of each linear it takes, and one slot."""
        return Counter({SLOT: 1, **{linear: rank for linear, (_, rank) in self.parts.items()}})


@dataclass(frozen=True)
class HostLayout:
    """What the blobs of a pool's adapters have in common."""

    # Name of each linear -> (in_features, out_features).
    linears: Mapping[str, tuple[int, int]]
    max_rank: int
    dtype: torch.dtype
    # Whether the host's memory is page-locked, so that a copy to the device is asynchronous.
    pinned: bool

    def pack(
        self, name: str, factors: Mapping[str, Factors], scaling: float | Mapping[str, float]
    ) -> HostAdapter:
        """The adapter as one blob, once everything was checked."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a name, got {name!r}")
        parts = self.parts(factors)
        pairs = factors.values()
        flat = [t for a, b in pairs for t in (a.detach().reshape(-1), b.detach().T.reshape(-1))]
        blob = (
            torch.cat([t.to("cpu", self.dtype) for t in flat]) if flat else torch.empty(0, dtype=self.dtype)
        )
        return HostAdapter(blob.pin_memory() if self.pinned else blob, parts, for_each(factors, scaling))

    def parts(self, factors: Mapping[str, Factors]) -> dict[str, tuple[int, int]]:
        """Where each linear's part lies in a blob, and its rank, once everything was checked."""
        parts, first = {}, 0
        for linear, (lora_a, lora_b) in factors.items():
            self._check(linear, lora_a, lora_b)
            parts[linear] = (first, lora_a.shape[0])
            first += lora_a.numel() + lora_b.numel()
        return parts

    def views(self, blob: Tensor, linear: str, first: int, rank: int) -> tuple[Tensor, Tensor]:
        """A and Bᵀ of a linear in a blob."""
        cols, out = self.linears[linear]
        middle, last = first + rank * cols, first + rank * (cols + out)
        return blob[first:middle].view(rank, cols), blob[middle:last].view(rank, out)

    def _check(self, linear: str, lora_a: Tensor, lora_b: Tensor) -> None:
        if linear not in self.linears:
            raise ValueError(f"factors: expected linears of {', '.join(self.linears)}, got {linear!r}")
        cols, out = self.linears[linear]
        for half, factor in (("A", lora_a), ("B", lora_b)):
            if not isinstance(factor, Tensor) or factor.dim() != 2 or not factor.is_floating_point():
                got = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, Tensor) else type(factor)
                raise ValueError(f"factors: {linear}: expected {half} to be a floating matrix, got {got}")
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, cols) or lora_b.shape != (out, rank):
            got = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            raise ValueError(f"factors: {linear}: expected A [r, {cols}] and B [{out}, r], got {got}")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"factors: {linear}: expected a rank of 1 to {self.max_rank}, got {rank}")


def for_each(factors: Mapping[str, Factors], scaling: float | Mapping[str, float]) -> dict[str, float]:
    """The scale of each linear."""
    return {linear: scaling[linear] if isinstance(scaling, Mapping) else scaling for linear in factors}
