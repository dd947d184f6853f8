"""DSiRe's spectra against dense ones, and its votes against a loop."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.analysis import DSiRe, lora_spectrum


def pair(r=3, cols=9, out=7):
    return torch.randn(r, cols, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)


def test_spectra_are_the_dense_ones_whatever_the_basis():
    torch.manual_seed(0)
    for sizes in ((3, 9, 7), (5, 4, 7), (5, 9, 3)):
        lora_a, lora_b = pair(*sizes)
        found = lora_spectrum(lora_a, lora_b)
        for name, dense in (("A", lora_a), ("B", lora_b), ("BA", lora_b @ lora_a)):
            want = torch.linalg.svdvals(dense)
            n = min(len(want), len(found[name]))
            torch.testing.assert_close(found[name][:n], want[:n], atol=1e-12, rtol=1e-10)
            assert not len(want[n:]) or want[n:].max() < 1e-10
        turn = torch.randn(sizes[0], sizes[0], dtype=torch.float64)
        moved = lora_spectrum(torch.linalg.solve(turn, lora_a), lora_b @ turn)["BA"]
        torch.testing.assert_close(moved, found["BA"], atol=1e-9, rtol=1e-9)


def scaled(size):
    """An adapter whose product grows with the size."""
    return {name: (a, size * b) for name, (a, b) in {n: pair() for n in ("q", "v")}.items()}


def test_votes_are_a_loop_over_layers_and_matrices():
    torch.manual_seed(0)
    sizes = [1, 4, 16] * 3
    adapters = [scaled(size) for size in sizes]
    dsire = DSiRe().fit(adapters, sizes)
    assert [dsire.predict(one) for one in adapters] == sizes
    other = scaled(4)
    votes = []
    for layer in other:
        for name in ("A", "B", "BA"):
            known = torch.stack([lora_spectrum(*one[layer])[name] for one in adapters])
            low, high = known.min(), known.max()
            spectrum = (lora_spectrum(*other[layer])[name] - low) / (high - low)
            far = [((one - low) / (high - low) - spectrum).norm() for one in known]
            votes.append(sizes[far.index(min(far))])
    most = max(votes.count(size) for size in sizes)
    assert dsire.predict(other) == min(size for size in sizes if votes.count(size) == most)


def test_bad_input():
    with pytest.raises(ValueError, match="sizes: expected one for each of the adapters, got 2"):
        DSiRe().fit([scaled(1)], [1, 2])
    with pytest.raises(ValueError, match=r"lora_b: expected A \[r, in\] and B \[out, r\]"):
        lora_spectrum(torch.zeros(2, 3), torch.zeros(4, 3))
    dsire = DSiRe().fit([scaled(1)], [1])
    with pytest.raises(
        ValueError, match=r"adapter: expected the layers and ranks of the first, got others at k.A"
    ):
        dsire.predict({"k": pair(), **scaled(1)})
