"""x by a block-diagonal matrix: every run of features by a small matrix of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._inputs import autocasts, cast, compute_dtype
from ._lora_function import output_like, rows_of

# Narrower blocks are joined, with zeros between them: a product of few columns is slower than the
# multiplications by zero that spare it.
_WIDTH = 32
# Elements from which a batched product of a CPU in the order of x, slower by itself, beats a copy into it.
_LARGE = 1 << 22


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """y = x diag(M_1, …, M_n): features i·k to (i + 1)·k of x by M_i

    x is ``[..., n·k]``, blocks ``[n, k, k]`` of its dtype, y of the shape of x. One pass over x; backward two
    over dy and one over x. y and dx are written where they belong, or on a CPU, while that is faster, copied
    there; x and the blocks are saved. No ``[n·k, n·k]`` is made.

    Raises:
        ValueError: blocks is no ``[n, k, k]`` with n·k the features of x.
        TypeError: they differ in dtype, outside of autocast.

    Examples:
        >>> x, blocks = torch.randn(5, 6), torch.randn(3, 2, 2)
        >>> torch.allclose(block_diagonal(x, blocks), x @ torch.block_diag(*blocks), atol=1e-5)
        True
    """
    _check(x, blocks)
    if autocasts(x):
        x, blocks = (cast(one, compute_dtype(x)) for one in (x, blocks))
    if _dispatch.transformed() or torch.compiler.is_compiling():
        return _composed(x, blocks)
    return _BlockDiagonal.apply(x, blocks)  # type: ignore[no-any-return]


def _check(x: Tensor, blocks: Tensor) -> None:
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[:2].numel() != x.shape[-1]:
        want = f"[n, k, k] with n·k = {x.shape[-1]}, the features of x"
        raise ValueError(f"blocks: expected {want}, got shape {tuple(blocks.shape)}")
    if blocks.dtype != x.dtype and not autocasts(x):
        raise TypeError(f"blocks: expected {x.dtype} (x's), got {blocks.dtype}")


def _composed(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)


class _BlockDiagonal(torch.autograd.Function):
    """Autograd's own would copy x and dy into the order of the batched product, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return output_like(_times(rows_of(x), _joined(blocks)), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        rows, wide = rows_of(dy), _joined(blocks)
        dx = _times(rows, wide.mT).view(dy.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, _parted(torch.bmm(_by_block(rows_of(x), wide).mT, _by_block(rows, wide)), blocks)


def _times(rows: Tensor, blocks: Tensor) -> Tensor:
    if rows.device.type == "cpu" and rows.numel() < _LARGE:
        return torch.bmm(_by_block(rows, blocks), blocks).transpose(0, 1).reshape(rows.shape)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.bmm(_by_block(rows, blocks), blocks, out=_by_block(y, blocks))
    return y


def _by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """[n, rows, k], a view."""
    return rows.unflatten(1, blocks.shape[:2]).transpose(0, 1)


def _joined(blocks: Tensor) -> Tensor:
    """[n/g, g·k, g·k]: as many side by side as divide n and make a product of up to ``_WIDTH`` columns."""
    together = _together(blocks)
    if together == 1:
        return blocks
    count, width, _ = blocks.shape
    wide = blocks.new_zeros(count // together, together, width, together, width)
    _diagonal(wide).copy_(blocks.unflatten(0, (-1, together)))
    return wide.view(count // together, together * width, together * width)


def _parted(wide: Tensor, blocks: Tensor) -> Tensor:
    """What :func:`_joined` put side by side."""
    together = _together(blocks)
    if together == 1:
        return wide
    count, width, _ = blocks.shape
    return _diagonal(wide.view(count // together, together, width, together, width)).reshape(blocks.shape)


def _diagonal(wide: Tensor) -> Tensor:
    """[n/g, g, k, k], a view of the blocks on the diagonal."""
    return wide.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _together(blocks: Tensor) -> int:
    count, width, _ = blocks.shape
    most = max(1, _WIDTH // max(1, width))
    return next(many for many in range(most, 0, -1) if count % many == 0)
