"""A matrix of few frequencies beside a linear: a transform of x, a gather, a transform back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .branched_linear import Branch

# Of each entry, in the order in which it is summed into the bins of y: its bin of x and its number; of each
# bin of y, where its sum then lies. The same with the sides swapped, and the bin of y of each. Last, by
# number, the bins of y and of x and the sign of the imaginary part.
INDICES = (
    *("forward_source", "forward_order", "forward_places"),
    *("backward_source", "backward_order", "backward_places", "backward_target"),
    *("target", "source", "sign"),
)


@dataclass(frozen=True)
class SparseSpectrum(Branch):
    """y += x ΔWᵀ, ΔW[p, q] = s/(out·in) · Σ_l c_l cos(2π(j_l p/out + k_l q/in)), ΔW never made

    = s · Re(ifft2(F)) with F[j_l, k_l] = c_l. Half the spectrum of x is computed (and saved, as large as x),
    n of its entries are scaled and summed into half the spectrum of y, and that is transformed back; the
    backward pass is the same with the two sides swapped. Sums have a fixed order. Half precision is computed
    in float32. Make it with :func:`plan`.
    """

    wide = True

    in_features: int
    scaling: float
    # How many bins get a first, a second, … entry.
    forward_levels: tuple[int, ...]
    backward_levels: tuple[int, ...]

    @property
    def _scale(self) -> float:
        return self.scaling / (self.in_features * self.out_features)

    def add_(self, y: Tensor, x: Tensor, spectrum: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        picked, order, places, *_, target, _, sign = indices
        wide = torch.promote_types(x.dtype, torch.float32)
        bins_x = _spectra(x.to(wide))
        weights = _weights(spectrum.to(wide) * self._scale, sign, target, self.out_features)[order]
        entries = torch.view_as_real(bins_x.index_select(1, picked)) * weights
        y += _summed(entries, self.forward_levels, places, self.out_features)
        return (torch.view_as_real(bins_x), spectrum, *indices)

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of c."""
        bins_x, spectrum, *_, picked_x, order, places, picked_y, _, source, sign = saved
        wide = bins_x.dtype
        bins_y = torch.view_as_real(_spectra(dy.to(wide)).index_select(1, picked_y))
        grad = None
        if needs[0]:
            entries = torch.view_as_real(torch.view_as_complex(bins_x).index_select(1, picked_x))
            products = (bins_y * entries).sum(0)
            ordered = (products[:, 0] + products[:, 1] * sign[order]) * self._scale
            grad = torch.empty_like(ordered).index_copy_(0, order, ordered)
        if dx is not None:
            weights = _weights(spectrum.to(wide) * self._scale, sign, source, self.in_features)[order]
            dx += _summed(bins_y * weights, self.backward_levels, places, self.in_features)
        return [grad, *[None] * len(INDICES)]


def plan(
    positions: Tensor, in_features: int, out_features: int, scaling: float
) -> tuple[SparseSpectrum, dict[str, Tensor]]:
    """The branch for F's entries at ``positions`` (row · in + column), and the indices that it takes."""
    j, k = positions // in_features, positions % in_features
    mirrored_j, mirrored_k = j > out_features // 2, k > in_features // 2
    target = torch.where(mirrored_j, out_features - j, j)
    source = torch.where(mirrored_k, in_features - k, k)
    forward, forward_places, forward_levels = _levels(target, out_features // 2 + 1)
    backward, backward_places, backward_levels = _levels(source, in_features // 2 + 1)
    # ifft's spectrum of a real x is the conjugate of fft's.
    sign = torch.where(mirrored_j == mirrored_k, -1, 1)
    found = (
        *(source[forward], forward, forward_places),
        *(source[backward], backward, backward_places, target[backward]),
        *(target, source, sign),
    )
    branch = SparseSpectrum(out_features, in_features, scaling, forward_levels, backward_levels)
    return branch, dict(zip(INDICES, found, strict=True))


def _spectra(rows: Tensor) -> Tensor:
    """``rfft`` of each row; MKL refuses to transform none."""
    if not len(rows):
        return rows.new_empty(0, rows.shape[1] // 2 + 1, dtype=rows.dtype.to_complex())
    return torch.fft.rfft(rows)


def _levels(bins: Tensor, count: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """An order of the entries in which each bin's first come first, then each bin's second, and so on.

    Within a level the bins go in one order, those with most entries first, so that every level is a prefix of
    the one before. Second, each bin's place in that order, or that of a zero behind it; third, the sizes.
    """
    counts = torch.bincount(bins, minlength=count)
    by_count = counts.argsort(descending=True, stable=True)
    place = torch.empty_like(by_count).index_copy_(0, by_count, torch.arange(count))
    by_bin = place[bins].argsort(stable=True)
    starts = counts[by_count].cumsum(0) - counts[by_count]
    level = torch.arange(len(bins)) - starts[place[bins[by_bin]]]
    sizes = torch.bincount(level).tolist()
    return by_bin[level.argsort(stable=True)], place.clamp(max=sizes[0]), tuple(sizes)


def _weights(spectrum: Tensor, sign: Tensor, bins: Tensor, length: int) -> Tensor:
    """[n, 2]: what each entry's parts count for in ``irfft``, which has most bins twice, over length."""
    once = (bins == 0) | (2 * bins == length)
    weights = spectrum * torch.where(once, length, length / 2)
    return torch.stack((weights, weights * sign), 1)


def _summed(entries: Tensor, levels: tuple[int, ...], places: Tensor, length: int) -> Tensor:
    """Entries [rows, n, 2] in the order of :func:`_levels`, summed by bin and transformed back."""
    if not len(entries):
        return entries.new_empty(0, length)
    first, *others = entries.split(levels, 1)
    sums = torch.nn.functional.pad(first, (0, 0, 0, 1))
    for more in others:
        sums[:, : more.shape[1]] += more
    return torch.fft.irfft(torch.view_as_complex(sums).index_select(1, places), n=length)
