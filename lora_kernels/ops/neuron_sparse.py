"""Some rows, or some columns, of a matrix beside a linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class RowSparse(Branch):
    """y[:, R] += x Dᵀ: rows R of ΔW are D ``[|R|, in]``, R each once."""

    def add_(self, y: Tensor, x: Tensor, rows: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        y[:, rows] += x @ delta.T
        return x, rows, delta

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of D; the rest of dY is not read."""
        x, rows, delta = saved
        part = dy[:, rows]
        if dx is not None:
            dx.addmm_(part, delta)
        return [None, part.T @ x if needs[1] else None]


@dataclass(frozen=True)
class ColumnSparse(Branch):
    """y += x[:, C] Dᵀ: columns C of ΔW are D ``[out, |C|]``, C each once; of x only these are saved."""

    def add_(self, y: Tensor, x: Tensor, columns: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        part = x[:, columns]
        y.addmm_(part, delta.T)
        return part, columns, delta

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of D."""
        part, columns, delta = saved
        if dx is not None:
            dx[:, columns] += dy @ delta
        return [None, dy.T @ part if needs[1] else None]
