"""Circular blocks beside a linear: half spectra of x and of the blocks, multiplied and transformed back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class BlockCircular(Branch):
    """y_m += s Σ_n irfft(rfft(x_n) · conj(rfft(w_mn))), x and y in blocks of b features

    w is ``[out/b, in/b, b]``: block (m, n) of ΔW is circular, s w[m, n, (j - i) mod b] at (i, j), and none is
    made. Half spectra, since all is real; that of x is saved. Half precision is computed in
    float32.
    """

    wide = True

    scaling: float

    def add_(self, y: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        size, wide = kernel.shape[-1], torch.promote_types(x.dtype, torch.float32)
        bins_x = _bins(x.to(wide), size)
        bins = torch.einsum("rnf,mnf->rmf", bins_x, torch.fft.rfft(kernel.to(wide)).conj())
        _add_signal(y, bins, size, self.scaling)
        return torch.view_as_real(bins_x), kernel

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of w."""
        bins_x, kernel = torch.view_as_complex(saved[0]), saved[1]
        size, wide = kernel.shape[-1], saved[0].dtype
        bins_y = _bins(dy.to(wide), size)
        if dx is not None:
            bins = torch.einsum("rmf,mnf->rnf", bins_y, torch.fft.rfft(kernel.to(wide)))
            _add_signal(dx, bins, size, self.scaling)
        if not needs[0]:
            return [None]
        grad = torch.fft.irfft(torch.einsum("rmf,rnf->mnf", bins_y.conj(), bins_x), n=size)
        return [grad.mul_(self.scaling).to(kernel.dtype)]


def _bins(rows: Tensor, size: int) -> Tensor:
    """[rows, blocks, size // 2 + 1]; MKL refuses to transform none."""
    blocks = rows.unflatten(1, (-1, size))
    if not len(rows):
        return rows.new_empty(*blocks.shape[:2], size // 2 + 1, dtype=rows.dtype.to_complex())
    return torch.fft.rfft(blocks)


def _add_signal(out: Tensor, bins: Tensor, size: int, scaling: float) -> None:
    if len(out):
        out.add_(torch.fft.irfft(bins, n=size).flatten(1), alpha=scaling)
