"""One square matrix after each of several rotations: MoRA's type 6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch

_BASE = 10000.0


def turned(square: Tensor, blocks: int) -> Tensor:
    """M R_i for each block i, R_i the rotation by i · 10000^(-2k/w) of coordinates k and k + w/2

    As rotary embeddings turn x: M is ``[w, w]``, w even, and the result ``[blocks, w, w]``. The backward pass
    turns each block's gradient back and adds them up; M itself is not saved.
    """
    width = square.shape[0]
    places = torch.arange(width, device=square.device, dtype=square.dtype) % (width // 2)
    angles = torch.arange(blocks, device=square.device, dtype=square.dtype)[:, None]
    angles = (angles * _BASE ** (-2 * places / width))[:, None]
    if _dispatch.transformed():
        return _turn(square, angles.cos(), angles.sin())
    return _Turned.apply(square, angles.cos(), angles.sin())


def _turn(square: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = square.shape[0] // 2
    across = torch.cat((square[:, half:], -square[:, :half]), 1)
    return torch.addcmul(square * cos, across, sin)


class _Turned(torch.autograd.Function):
    """Autograd's own derivative would write each block's three more times."""

    @staticmethod
    def forward(ctx: Any, square: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(square, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        back, across = (grad * cos).sum(0), (grad * sin).sum(0)
        back[:, half:] += across[:, :half]
        back[:, :half] -= across[:, half:]
        return back, None, None
