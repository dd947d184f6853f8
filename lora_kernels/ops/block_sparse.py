"""A block-sparse matrix beside a linear: the products of its blocks alone, and of x what they read."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .branched_linear import Branch


class Piece(NamedTuple):
    """Rows and columns of ΔW that a block's first ``height`` rows fill, its columns from ``left`` on."""

    block: int
    row: int
    column: int
    height: int
    width: int
    left: int = 0
    # Where the columns begin in what is saved of x.
    saved_at: int = 0


@dataclass(frozen=True)
class BlockSparse(Branch):
    """y[:, R_i] += x[:, C_i] S_iᵀ for the pieces i of blocks S ``[blocks, p, q]``

    The products accumulate into y, and in the backward pass into dX; those of whole blocks along the diagonal
    are one batched product. Of x only the columns that any piece reads are saved, once each; x itself where
    that is all of them.
    """

    # Of the leading blocks, those that lie along the diagonal, and the pieces behind them.
    diagonal: int
    pieces: tuple[Piece, ...]
    # The spans of columns that are saved; none: all of x.
    kept: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece], in_features: int, out_features: int) -> Self:
        """With what is saved worked out: all of x where pieces read spans that overlap."""
        spans = sorted({(piece.column, piece.width) for piece in pieces})
        apart = all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        if not apart or sum(n for _, n in spans) >= in_features:
            placed = tuple(piece._replace(saved_at=piece.column) for piece in pieces)
            return cls(out_features, _diagonal(placed), placed[_diagonal(placed) :], ())
        starts, total = {}, 0
        for column, width in spans:
            starts[column], total = total, total + width
        placed = tuple(piece._replace(saved_at=starts[piece.column]) for piece in pieces)
        return cls(out_features, _diagonal(placed), placed[_diagonal(placed) :], tuple(spans))

    @property
    def writes(self) -> bool:
        """Whether it fills new memory as well: the product of the diagonal then reads nothing of it."""
        return self.diagonal > 0

    def add_(self, y: Tensor, x: Tensor, blocks: Tensor, write: bool = False) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        if self.diagonal:
            self._multiply_(y, self._along(x, blocks, 2), blocks[: self.diagonal].mT, write)
        for block, row, column, height, width, left, _ in self.pieces:
            factor = blocks[block, :height, left : left + width]
            y[:, row : row + height].addmm_(x[:, column : column + width], factor.T)
        kept = torch.cat([x[:, at : at + width] for at, width in self.kept], 1) if self.kept else x
        return kept, blocks

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of the blocks, and nothing of ΔW around them."""
        kept, blocks = saved
        grads = torch.empty_like(blocks) if needs[0] else None
        if grads is not None:
            grads[self.diagonal :] = 0
        if self.diagonal:
            part, whole = self._along(dy, blocks, 1), slice(self.diagonal)
            if grads is not None:
                grads[whole].baddbmm_(part.mT, self._along(kept, blocks, 2), beta=0)
            if dx is not None:
                self._multiply_(dx, part, blocks[whole], write)
        for block, row, column, height, width, left, at in self.pieces:
            part = dy[:, row : row + height]
            span = slice(left, left + width)
            if grads is not None:
                grads[block, :height, span].addmm_(part.T, kept[:, at : at + width])
            if dx is not None:
                dx[:, column : column + width].addmm_(part, blocks[block, :height, span])
        return [grads]

    def _multiply_(self, out: Tensor, left: Tensor, right: Tensor, write: bool) -> None:
        """The diagonal's products, added to ``out`` or in its place and zeros behind them."""
        if write:
            out[:, self.diagonal * right.shape[2] :] = 0
        self._along(out, right, 2).baddbmm_(left, right, beta=0 if write else 1)

    def _along(self, rows: Tensor, blocks: Tensor, side: int) -> Tensor:
        """[blocks on the diagonal, rows, side], a view."""
        size = blocks.shape[side]
        return rows[:, : self.diagonal * size].unflatten(1, (self.diagonal, size)).transpose(0, 1)


def _diagonal(pieces: Sequence[Piece]) -> int:
    """How many of the leading pieces are whole blocks of the first one's size along the diagonal."""
    height, width = pieces[0].height, pieces[0].width
    whole = (Piece(i, i * height, i * width, height, width, 0, i * width) for i in range(len(pieces)))
    found = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, pieces, whole)))
    return found if found > 1 else 0
