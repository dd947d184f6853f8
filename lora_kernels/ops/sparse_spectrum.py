"""A matrix of few frequencies beside a linear: a transform of x, a gather, a transform back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of each frequency: the bins of x and of y, the sign of the imaginary part, and the orders in which entries
# are summed into the bins of y, and of x.
INDICES = ("source", "target", "sign", "forward_order", "backward_order", "forward_bins", "backward_bins")


class SparseSpectrum(NamedTuple):
    """y += x ΔWᵀ, ΔW[p, q] = s/(out·in) · Σ_l c_l cos(2π(j_l p/out + k_l q/in)), ΔW never made

    = s · Re(ifft2(F)) with F[j_l, k_l] = c_l. Half the spectrum of x is computed (and saved, as large as x),
    n of its entries are scaled and summed into half the spectrum of y, and that is transformed back; the
    backward pass is the same with the two sides swapped. Sums have a fixed order. Half precision is computed
    in float32. Make it with :func:`plan`.
    """

    in_features: int
    out_features: int
    scaling: float
    # How many bins get a first, a second, … entry.
    forward_levels: tuple[int, ...]
    backward_levels: tuple[int, ...]

    @property
    def wide(self) -> bool:
        """Whether its tensors keep their dtype."""
        return True

    @property
    def _scale(self) -> float:
        return self.scaling / (self.in_features * self.out_features)

    def add_(self, y: Tensor, x: Tensor, spectrum: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        source, _, sign, order, _, bins, _ = indices
        wide = torch.promote_types(x.dtype, torch.float32)
        bins_x = _rfft(x.to(wide))
        coefficients = _signed(spectrum.to(wide), sign)[order]
        entries = bins_x[:, source[order]] * coefficients
        sums = _placed(entries, self.forward_levels, bins, self.out_features)
        y += _irfft(sums * self._scale, self.out_features)
        return (bins_x, spectrum, *indices)

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of c."""
        bins_x, spectrum, source, target, sign, _, order, _, bins = saved
        wide = bins_x.dtype
        bins_y = _rfft(dy.to(wide))[:, target[order]]
        grad = None
        if needs[0]:
            products = (bins_y * bins_x[:, source[order]]).sum(0)
            ordered = products[:, 0] + products[:, 1] * sign[order]
            scaled = ordered * self._scale
            grad = torch.empty_like(scaled).index_copy_(0, order, scaled)
        if dx is not None:
            entries = bins_y * _signed(spectrum.to(wide), sign)[order]
            sums = _placed(entries, self.backward_levels, bins, self.in_features)
            dx += _irfft(sums * self._scale, self.in_features)
        return [grad, *[None] * len(INDICES)]


def plan(
    positions: Tensor, in_features: int, out_features: int, scaling: float
) -> tuple[SparseSpectrum, dict[str, Tensor]]:
    """The branch for F's entries at ``positions`` (row · in + column), and the indices that it takes."""
    j, k = positions // in_features, positions % in_features
    mirrored_j, mirrored_k = j > out_features // 2, k > in_features // 2
    target = torch.where(mirrored_j, out_features - j, j)
    source = torch.where(mirrored_k, in_features - k, k)
    forward_order, forward_bins, forward_levels = _levels(target)
    backward_order, backward_bins, backward_levels = _levels(source)
    # ifft's spectrum of a real x is the conjugate of fft's.
    sign = torch.where(mirrored_j == mirrored_k, -1, 1)
    found = (source, target, sign, forward_order, backward_order, forward_bins, backward_bins)
    branch = SparseSpectrum(in_features, out_features, scaling, forward_levels, backward_levels)
    return branch, dict(zip(INDICES, found, strict=True))


def _levels(bins: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """An order of the entries in which each bin's first come first, then each bin's second, and so on.

    Within a level the bins go in one order, which is the second result; those with most entries lead.
    """
    counts = torch.bincount(bins)
    by_count = counts.argsort(descending=True, stable=True)
    place = torch.empty_like(by_count).index_copy_(0, by_count, torch.arange(len(by_count)))
    by_bin = place[bins].argsort(stable=True)
    starts = counts[by_count].cumsum(0) - counts[by_count]
    level = torch.arange(len(bins)) - starts[place[bins[by_bin]]]
    order = by_bin[level.argsort(stable=True)]
    sizes = torch.bincount(level).tolist() if len(bins) else []
    return order, by_count[: sizes[0] if sizes else 0], tuple(sizes)


def _signed(spectrum: Tensor, sign: Tensor) -> Tensor:
    return torch.stack((spectrum, spectrum * sign), 1)


def _placed(entries: Tensor, levels: tuple[int, ...], bins: Tensor, length: int) -> Tensor:
    """Entries [rows, n, 2] in the order of :func:`_levels`, summed into the bins of half a spectrum."""
    first, *others = entries.split(levels, 1)
    sums = first.clone() if others else first
    for more in others:
        sums[:, : more.shape[1]] += more
    placed = entries.new_zeros(entries.shape[0], length // 2 + 1, 2)
    return placed.index_copy(1, bins, sums)


def _rfft(x: Tensor) -> Tensor:
    """[rows, bins, 2]."""
    return torch.view_as_real(torch.fft.rfft(x))


def _irfft(bins: Tensor, length: int) -> Tensor:
    """Re Σ_j bins_j e^(2πi j p/length), p < length, over half a spectrum: every bin counts once."""
    edges = bins.new_full((bins.shape[1], 1), length / 2)
    edges[0] = length
    if length % 2 == 0:
        edges[-1] = length
    return torch.fft.irfft(torch.view_as_complex(bins * edges), n=length)
