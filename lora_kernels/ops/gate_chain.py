"""A chain of small gates, each on two axes of x: the factors of a full-rank matrix that is never made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class GateChain(NamedTuple):
    """y += (T_G … T_1) x, gate T on axes (j, i) of x seen as ``[rows, *dims]``

    x is padded with zeros to Πdims features, and what comes out is cut, or ends early, at y's. The pairs of
    axes go (-1,-2), (-1,-3), …, (-2,-3), …; each gate is ``[d_j d_i, d_j d_i]``, i nearer the end. x is
    saved; the backward pass computes the chain anew.
    """

    dims: tuple[int, ...]
    out_features: int

    @property
    def wide(self) -> bool:
        """Whether its tensors keep their dtype."""
        return False

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(i, j) of each gate."""
        return tuple(itertools.combinations(range(-1, -len(self.dims) - 1, -1), 2))

    def size(self, pair: tuple[int, int]) -> int:
        """Rows of the gate on a pair."""
        return self.dims[pair[0]] * self.dims[pair[1]]

    def add_(self, y: Tensor, x: Tensor, *gates: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        h = self._open(x)
        for pair, gate in zip(self.pairs, gates, strict=True):
            h = self._back(self._flat(h, pair) @ gate.T, h, pair)
        self._close_(y, h)
        return (x, *gates)

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of each gate."""
        x, *gates = saved
        inputs, h = [], self._open(x)
        for pair, gate in zip(self.pairs, gates, strict=True):
            inputs.append(self._flat(h, pair))
            h = self._back(inputs[-1] @ gate.T, h, pair)
        g, grads = self._open(dy), []
        for pair, gate, flat, needed in reversed(list(zip(self.pairs, gates, inputs, needs, strict=True))):
            part = self._flat(g, pair)
            grads.append(part.T @ flat if needed else None)
            g = self._back(part @ gate, g, pair)
        if dx is not None:
            self._close_(dx, g)
        return grads[::-1]

    def _open(self, x: Tensor) -> Tensor:
        """[rows, *dims]."""
        total = math.prod(self.dims)
        return F.pad(x, (0, total - x.shape[1]))[:, :total].unflatten(1, self.dims)

    def _close_(self, y: Tensor, h: Tensor) -> None:
        width = min(y.shape[1], math.prod(self.dims))
        y[:, :width] += h.flatten(1)[:, :width]

    def _flat(self, h: Tensor, pair: tuple[int, int]) -> Tensor:
        i, j = pair
        return h.movedim((j, i), (-2, -1)).reshape(-1, self.size(pair))

    def _back(self, flat: Tensor, like: Tensor, pair: tuple[int, int]) -> Tensor:
        """In the order of ``like``, as a view: the next gate's order may be this one's."""
        i, j = pair
        return flat.view(like.movedim((j, i), (-2, -1)).shape).movedim((-2, -1), (j, i))
