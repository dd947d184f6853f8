"""A chain of gates on pairs of axes, in eager PyTorch: a copy into each gate's order, and a product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import GateChainBackward, flat


def pairs(axes: int) -> list[tuple[int, int]]:
    """(i, j) of each gate, in order, counted from the end."""
    return list(itertools.combinations(range(-1, -axes - 1, -1), 2))


def _open(x: Tensor, dims: Sequence[int]) -> Tensor:
    total = math.prod(dims)
    return F.pad(x, (0, total - x.shape[1]))[:, :total].unflatten(1, dims)


def _close(out: Tensor, h: Tensor, add: bool) -> None:
    """Cut, or ended early, at the width of ``out``."""
    width = min(out.shape[1], h[0].numel() if len(h) else 0)
    if not add:
        out[:, width:] = 0
    out[:, :width] = h.flatten(1)[:, :width] + (out[:, :width] if add else 0)


def _flat(h: Tensor, pair: tuple[int, int]) -> Tensor:
    i, j = pair
    return h.movedim((j, i), (-2, -1)).reshape(-1, h.shape[i] * h.shape[j])


def _back(flat: Tensor, like: Tensor, pair: tuple[int, int]) -> Tensor:
    """In the order of ``like``, as a view: the next gate's order may be this one's."""
    i, j = pair
    return flat.view(like.movedim((j, i), (-2, -1)).shape).movedim((-2, -1), (j, i))


def gate_chain(out: Tensor, x: Tensor, gates: Sequence[Tensor], dims: Sequence[int], add: bool) -> None:
    """The op of ``_ops.py``."""
    h = _open(x, dims)
    for pair, gate in zip(pairs(len(dims)), gates, strict=True):
        h = _back(_flat(h, pair) @ gate.T, h, pair)
    _close(out, h, add)


@flat(GateChainBackward)
def gate_chain_backward(saved: GateChainBackward) -> None:
    """The backward op of ``_ops.py``: fills the gradients."""
    dy, x, gates, dims, dx, add, grads = saved
    inputs, h, g = [], _open(x, dims), _open(dy, dims)
    steps = list(zip(pairs(len(dims)), gates, grads, strict=True))
    for pair, gate, _ in steps:
        inputs.append(_flat(h, pair))
        h = _back(inputs[-1] @ gate.T, h, pair)
    for pair, gate, grad in reversed(steps):
        part, kept = _flat(g, pair), inputs.pop()
        if grad.numel():
            torch.mm(part.T, kept, out=grad)
        g = _back(part @ gate, g, pair)
    if dx is not None:
        _close(dx, g, add)
