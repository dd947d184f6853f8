"""NeFT: chosen neurons, rows or columns of W, train, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.neuron_sparse import ColumnSparse, RowSparse
from ..base import register
from ..call import Call
from ..site import Site, Start
from ..update import Branched
from .base import Structured


@register("neft")
class NeFT(Structured):
    """ΔW[R] = D, D [|R|, in], or ΔW[:, C] = D, D [out, |C|], zero elsewhere

    NeFT (Xu et al., 2024, arXiv 2403.11621). An MLP's neuron is a row of its up-projection and a column of
    its down-projection. D, called ``neurons``, trains, from zero, beside a frozen W: what is not chosen never
    moves, whatever the optimiser does. Only D's gradient is computed; with columns only these of x are saved.

    ``method_options``: ``rows`` or ``columns``, numbers, or a dict of them by the layer's name, as
    :func:`lora_kernels.stats.select_neurons` gives. r and α are not used.

    Raises:
        ValueError: neither or both for a layer, or numbers that are twice there or outside.
    """

    options = frozenset({"rows", "columns"})
    neurons: Tensor
    index: Tensor

    def build(self, site: Site) -> Start:
        """D, zero, and where it lies."""
        rows, columns = _given(site, "rows"), _given(site, "columns")
        if (not rows) == (not columns):
            name = site.name or "the layer"
            raise ValueError(f"rows: neft expects rows or columns for {name!r}, got {rows} and {columns}")
        by_rows = bool(rows)
        chosen, length = (rows, site.out_features) if by_rows else (columns, site.in_features)
        if len(set(chosen)) < len(chosen) or not all(0 <= at < length for at in chosen):
            what = "rows" if by_rows else "columns"
            raise ValueError(f"{what}: neft expects different numbers below {length}, got {chosen}")
        self.branch: Any = (RowSparse if by_rows else ColumnSparse)(site.out_features)
        count = len(chosen)
        zeros = site.zeros(count, site.in_features) if by_rows else site.zeros(site.out_features, count)
        return Start({"neurons": zeros, "index": torch.tensor(chosen)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Branched:
        """The chosen rows or columns on x."""
        return self.branched(x, self.branch, self.index, self.neurons)


def _given(site: Site, name: str) -> list[int]:
    given = site.option(name, None)
    given = given.get(site.name) if isinstance(given, dict) else given
    if not isinstance(given, (list, tuple, type(None))):
        raise ValueError(f"{name}: neft expects a list of numbers or a dict of such, got {given!r}")
    return list(given or ())
