"""DSiRe: how many samples an adapter was trained on, read from its singular values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Adapter = Mapping[str, tuple[Tensor, Tensor]]  # layer -> A [r, in] and B [out, r]


@torch.no_grad()
def lora_spectrum(lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
    """The singular values of A, of B and of B A, each ``[r]``; that of the product from two triangles

    Raises:
        ValueError: the factors do not fit each other.

    Examples:
        >>> sorted(lora_spectrum(torch.randn(2, 8), torch.randn(4, 2)))
        ['A', 'B', 'BA']
    """
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        got = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        raise ValueError(f"lora_b: expected A [r, in] and B [out, r], got {got}")
    r_a, r_b = torch.linalg.qr(lora_a.T).R, torch.linalg.qr(lora_b).R
    values = {"A": torch.linalg.svdvals(r_a), "B": torch.linalg.svdvals(r_b)}
    return {**values, "BA": torch.linalg.svdvals(r_b @ r_a.T)}


class DSiRe:
    """For each layer and each of A, B and B A the nearest training spectrum's size; then the majority

    DSiRe (Salama et al., 2024, arXiv 2406.19395). Spectra are scaled by the least and the largest value of
    that layer and matrix over the training adapters. Of sizes with as many votes the smaller one is taken.
    """

    def fit(self, adapters: Sequence[Adapter], sizes: Sequence[int]) -> DSiRe:
        """Remembers the spectra of adapters whose training sets had these sizes.

        Raises:
            ValueError: none, not one size for each, or adapters of other layers or ranks.
        """
        if not adapters or len(adapters) != len(sizes):
            raise ValueError(f"sizes: expected one for each of the adapters, got {len(sizes)}")
        spectra = [_spectra(one) for one in adapters]
        for one in spectra:
            _same_layers(one, spectra[0])
        self.sizes = list(sizes)
        self.known = {key: torch.stack([one[key] for one in spectra]) for key in spectra[0]}
        return self

    def predict(self, adapter: Adapter) -> int:
        """The size of the adapter's training set.

        Raises:
            ValueError: other layers or ranks than those of the training adapters.
        """
        spectra = _spectra(adapter)
        _same_layers(spectra, {key: known[0] for key, known in self.known.items()})
        votes: Counter[int] = Counter()
        for key, known in self.known.items():
            span = (known.max() - known.min()).clamp(min=torch.finfo(known.dtype).tiny)
            far = ((known - spectra[key]) / span).norm(dim=1)
            votes[self.sizes[int(far.argmin())]] += 1
        return min(votes, key=lambda size: (-votes[size], size))


def _spectra(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": values
        for layer, pair in adapter.items()
        for name, values in lora_spectrum(*pair).items()
    }


def _same_layers(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    got, wanted = ({key: len(values) for key, values in both.items()} for both in (one, other))
    if got != wanted:
        names = sorted(key for key in got.keys() | wanted.keys() if got.get(key) != wanted.get(key))
        raise ValueError(f"adapter: expected the layers and ranks of the first, got others at {names[0]}")
