"""SMT: chosen square blocks of W train, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.block_sparse import BlockSparse, Piece
from ..base import register
from ..call import Call
from ..site import Site, Start
from ..update import Branched
from .base import Structured


@register("smt")
class SMT(Structured):
    """ΔW[i·l : (i+1)·l, j·l : (j+1)·l] = S_n for the n-th chosen block (i, j), zero elsewhere

    Sparse Matrix Tuning (He et al., 2024, arXiv 2405.15525). S ``[n, l, l]`` trains, from zero, beside a
    frozen W: the step of training these blocks of W itself, but that weight decay would pull ΔW, and not W,
    to zero. Only the blocks' gradients are computed, and of x only the columns they read are saved.

    ``method_options``: ``blocks``, pairs (i, j), or a dict of them by the layer's name, as
    :func:`lora_kernels.stats.select_blocks` gives; ``block``, l (256). r and α are not used.

    Raises:
        ValueError: l does not divide both sizes, or blocks are missing, twice there or outside.
    """

    options = frozenset({"block", "blocks"})
    blocks: Tensor

    def build(self, site: Site) -> Start:
        """The blocks, zero."""
        size = site.whole_option("block", 256)
        site.must_divide("block", size, "in_features", "out_features")
        chosen = _chosen(site, size)
        pieces = [Piece(n, i * size, j * size, size, size) for n, (i, j) in enumerate(chosen)]
        self.branch = BlockSparse.of(pieces, site.in_features, site.out_features)
        return Start({"blocks": site.zeros(len(chosen), size, size)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Branched:
        """The blocks on their columns of x."""
        return self.branched(x, self.branch, self.blocks)


def _chosen(site: Site, size: int) -> list[tuple[int, int]]:
    given: Any = site.option("blocks", None)
    given = given.get(site.name) if isinstance(given, dict) else given
    rows, columns = site.out_features // size, site.in_features // size
    listed = isinstance(given, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in given)
    chosen = [tuple(pair) for pair in given] if listed else []
    inside = all(len(pair) == 2 and 0 <= pair[0] < rows and 0 <= pair[1] < columns for pair in chosen)
    if not chosen or not inside or len(set(chosen)) < len(chosen):
        where = f"within {rows} by {columns} for {site.name or 'the layer'!r}"
        raise ValueError(f"blocks: smt expects different pairs {where}, got {given!r}")
    return chosen  # type: ignore[return-value]
