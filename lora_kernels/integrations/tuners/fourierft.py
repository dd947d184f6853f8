"""FourierFT (Gao et al., 2024, arXiv 2405.03003): few coefficients of ΔW's discrete Fourier transform."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import Tensor

from ...adapters.structured.fourierft import is_few, places, waves
from ...adapters.update import Branched, LowRank
from ...ops.sparse_spectrum import SparseSpectrum, plan
from .base import FusedTuner, linear


class FusedFourierFT(FusedTuner, FourierFTLinear):
    """y = x Wᵀ + b + s x Re(ifft2(F))ᵀ: by transforms of x, or as low rank where F has few entries.

    What ``torch.compile`` makes is PEFT's: it cannot trace how the places of the entries are drawn.
    """

    per_adapter = "fourierft_spectrum"

    def why_not_adapter(self, name: str) -> str | None:
        """Only while compiling."""
        return "it is compiled" if torch.compiler.is_compiling() else None

    def update(self: Any, name: str, x: Tensor) -> Branched | LowRank:
        """As our own FourierFT."""
        c, sizes = self.fourierft_spectrum[name], (self.in_features, self.out_features)
        scaling = float(self.fourierft_scaling[name])
        where = (*sizes, len(c), self.fourierft_random_loc_seed[name], x.device)
        if is_few(len(c), *sizes):
            return waves(c, _positions(*where), *sizes, scaling)
        branch, indices = _plan(*where)
        return Branched(dataclasses.replace(branch, scaling=scaling), (c, *indices))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too
def _positions(in_features: int, out_features: int, n: int, seed: int, device: torch.device) -> Tensor:
    return places(in_features * out_features, n, seed).to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too
def _plan(
    in_features: int, out_features: int, n: int, seed: int, device: torch.device
) -> tuple[SparseSpectrum, tuple[Tensor, ...]]:
    """The branch of scaling 1, and its indices where x is."""
    positions = places(in_features * out_features, n, seed)
    branch, indices = plan(positions, in_features, out_features, 1.0)
    return branch, tuple(index.to(device) for index in indices.values())


TAKEOVERS = {FourierFTLinear: linear(FusedFourierFT)}
