"""A matrix of k × k blocks of low rank beside a linear: GraLoRA's, whose blocks of a row share no A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class BlockRank(Branch):
    """y_j += s · Σ_n h_nj B_jn, h_n = x_n A_n cut in k parts h_nj

    A is ``[k, in/k, r]`` and B ``[k, r, out/k]``, its r rows the k parts B_jn: what GraLoRA calls an exchange
    between blocks. Two batched products, the second into y, where the base product then accumulates. x and
    h ``[rows, k r]`` are saved.
    """

    writes = True

    blocks: int
    scaling: float

    def add_(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, write: bool = False) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        h = _exchanged(torch.bmm(self._along(x), down))
        self._add_(y, h, up, self.scaling, write)
        return x, h, down, up

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of A and B."""
        x, h, down, up = saved
        dy = self._along(dy)
        dh = _exchanged(torch.bmm(dy, up.mT).mul_(self.scaling))
        if dx is not None:
            self._add_(dx, dh, down.mT, 1.0, write)
        d_up = torch.bmm(h.mT, dy).mul_(self.scaling) if needs[1] else None
        return [torch.bmm(self._along(x).mT, dh) if needs[0] else None, d_up]

    def _add_(self, out: Tensor, left: Tensor, right: Tensor, scale: float, write: bool) -> None:
        """The blocks' products, added to ``out`` or in its place."""
        if not torch.compiler.is_compiling():
            self._along(out).baddbmm_(left, right, beta=0 if write else 1, alpha=scale)
            return
        # The compiler undoes the view of what an in-place product becomes, which this one does not allow.
        part = (torch.bmm(left, right) * scale).transpose(0, 1).flatten(1)
        (Tensor.copy_ if write else Tensor.add_)(out, part)

    def _along(self, rows: Tensor) -> Tensor:
        """[blocks, rows, features of a block], a view."""
        return rows.unflatten(1, (self.blocks, -1)).transpose(0, 1)


def _exchanged(h: Tensor) -> Tensor:
    """Block n's part for j at j's for n: its own transpose."""
    blocks, rows, rank = h.shape
    return h.unflatten(2, (blocks, -1)).transpose(0, 2).reshape(blocks, rows, rank)
