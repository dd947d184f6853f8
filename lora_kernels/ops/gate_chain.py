"""A chain of small gates, each on two axes of x: the factors of a full-rank matrix that is never made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..reference import gate_chain as reference
from . import _dispatch
from .branched_linear import Branch


@dataclass(frozen=True)
class GateChain(Branch):
    """y += (T_G … T_1) x, gate T on axes (j, i) of x seen as ``[rows, *dims]``

    x is padded with zeros to Πdims features, and what comes out is cut, or ends early, at y's. The pairs of
    axes go (-1,-2), (-1,-3), …, (-2,-3), …; each gate is ``[d_j d_i, d_j d_i]``, i nearer the end. x is
    saved; the backward pass computes the chain anew.
    """

    writes = True

    dims: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(i, j) of each gate."""
        return tuple(reference.pairs(len(self.dims)))

    def size(self, pair: tuple[int, int]) -> int:
        """Rows of the gate on a pair."""
        return self.dims[pair[0]] * self.dims[pair[1]]

    def add_(self, y: Tensor, x: Tensor, *gates: Tensor, write: bool = False) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        given = (y, x, list(gates), list(self.dims), not write)
        if _dispatch.transformed():  # which differentiates what is composed, and no op
            reference.gate_chain(*given)
        else:
            _dispatch.call("gate_chain", *given)
        return (x, *gates)

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of each gate."""
        x, *gates = saved
        grads = [g.new_empty(g.shape if n else 0) for g, n in zip(gates, needs, strict=True)]
        _dispatch.call("gate_chain_backward", dy, x, gates, list(self.dims), dx, not write, grads)
        return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
