"""MoRA: one square matrix between a compression of x and its reverse."""

from __future__ import annotations

import math

from torch import Tensor

from ...ops.block_sparse import BlockSparse, Piece
from ...ops.folded_square import FoldedSquare
from ...ops.turned_square import turned
from ..base import register
from ..call import Call
from ..site import Site, Start
from ..update import Branched
from .base import Structured


@register("mora")
class MoRA(Structured):
    """ΔW x = decompress(M compress(x)), M [r̂, r̂] with r̂ = ⌊√((in + out) r) + ½⌋

    MoRA (Jiang et al., 2024, arXiv 2405.12130). M alone trains, from zero, and there is no scale: α is not
    used. ``method_options={"type": t}`` with the repository's numbers:

    * 1: features j mod r̂ are added up, M's outputs repeated in turn: rank r̂ (the paper's for large r).
    * 2, 3, 4: neighbours instead of strides; both ways, on the way in alone, on the way out alone.
    * 6 (default): each r̂ neighbours of x are turned by an angle of their place, as RoPE does, and multiplied
      by M: block i of a block-diagonal ΔW is M R_i, of any rank; r̂ is even.

    x wraps round at its end where r̂ does not divide ``in``. Nothing of size in × out is made; type 6 makes
    the ``[in/r̂, r̂, r̂]`` blocks, the others save ``[tokens, r̂]`` and not x.

    Raises:
        ValueError: no such type.
    """

    options = frozenset({"type"})
    square: Tensor

    def build(self, site: Site) -> Start:
        """M, zero or with ``init_lora_weights=False`` random."""
        self.kind = site.option("type", 6, choices=(1, 2, 3, 4, 6))
        width = int(math.sqrt((site.in_features + site.out_features) * self.r) + 0.5)
        width = width // 2 * 2 if self.kind == 6 else width
        sizes = (site.in_features, site.out_features)
        folded = FoldedSquare(site.out_features, width, self.kind in (1, 4), self.kind in (1, 3))
        self.branch = _diagonal(width, *sizes) if self.kind == 6 else folded
        zero = site.config.init_lora_weights is not False
        return Start({"square": site.zeros(width, width) if zero else site.kaiming(width, width)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Branched:
        """Type 6 turns M's columns, and not x."""
        blocks = -(-self.in_features // self.square.shape[0])
        return self.branched(x, self.branch, turned(self.square, blocks) if self.kind == 6 else self.square)


def _diagonal(width: int, in_features: int, out_features: int) -> BlockSparse:
    """Block i at rows and columns i; columns wrap round at the end of x, blocks repeat to the end of y."""
    blocks, pieces = -(-in_features // width), []
    for row in range(0, out_features, width):
        block, height = row // width % blocks, min(width, out_features - row)
        column, left = block * width, 0
        while left < width:
            count = min(width - left, in_features - column)
            pieces.append(Piece(block, row, column, height, count, left))
            column, left = 0, left + count
    return BlockSparse.of(pieces, in_features, out_features)
