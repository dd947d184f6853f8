"""FourierFT: few coefficients of ΔW's discrete Fourier transform."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...ops.sparse_spectrum import INDICES, plan
from ..base import register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import Branched, LowRank
from .base import Structured

# The share of the smaller side that n may have for the trigonometric factors to cost less than transforms.
_FEW = 1 / 16


@register("fourierft")
class FourierFT(Structured):
    """ΔW = α Re(ifft2(F)), F zero but for F[j_l, k_l] = c_l, l < n

    FourierFT (Gao et al., 2024, arXiv 2405.03003). c ``[n]``, called ``fourierft_spectrum`` as in PEFT,
    trains; the places are the first n of a random permutation, the same for all layers of a shape.
    ``method_options`` has PEFT's names: ``n_frequency`` (1000), ``scaling`` α (150), ``random_loc_seed``
    (777). c starts at zero; with ``init_lora_weights=False`` at N(0, 1), the paper's way, which does not
    start at the base. r and ``lora_alpha`` are not used.

    No ΔW is made: for n up to a sixteenth of the smaller side the update is low rank,
    A = [cos; sin](2π k q/in), B = [cos, sin](2π j p/out) with ±c as the gate, made anew at each call; beyond,
    x is transformed, n of its frequencies scaled and summed, and the sum transformed back.

    Raises:
        ValueError: n is not in 1 … in · out.
    """

    options = frozenset({"n_frequency", "scaling", "random_loc_seed"})
    peft_form = PeftForm(
        "FOURIERFT", options={name: name for name in sorted(options)}, unread=frozenset({"init_weights"})
    )
    fourierft_spectrum: Tensor

    def build(self, site: Site) -> Start:
        """c, and where its entries lie."""
        n, size = site.whole_option("n_frequency", 1000), site.in_features * site.out_features
        if n > size:
            raise ValueError(f"n_frequency: fourierft expects at most in · out = {size}, got {n}")
        self.scaling = float(site.option("scaling", 150.0))
        positions = places(size, n, site.whole_option("random_loc_seed", 777, 0))
        self.few = is_few(n, site.in_features, site.out_features)
        self.plain = self.few  # type: ignore[misc]
        self.branch, indices = plan(positions, site.in_features, site.out_features, self.scaling)
        device: Any = "cpu" if torch.device(site.device or "cpu").type == "meta" else site.device
        for name, value in {"positions": positions, **indices}.items():
            self.register_buffer(name, value.to(device), persistent=False)
        zero = site.config.init_lora_weights is not False
        return Start({"fourierft_spectrum": site.zeros(n) if zero else site.normal(n)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Branched | LowRank:
        """Factors for few entries, else the transforms."""
        c = self.fourierft_spectrum
        if not self.few:
            return self.branched(x, self.branch, c, *(getattr(self, name) for name in INDICES))
        return waves(c, self.positions, self.in_features, self.out_features, self.scaling)


def is_few(n: int, in_features: int, out_features: int) -> bool:
    """Whether n entries cost less as a low rank than by transforms."""
    return n <= _FEW * min(in_features, out_features)


def waves(c: Tensor, positions: Tensor, in_features: int, out_features: int, scaling: float) -> LowRank:
    """The update as A = [cos; sin](2π k q/in), B = [cos, sin](2π j p/out) with ±c as the gate."""
    rows, columns = positions // in_features, positions % in_features
    lora_a, lora_b = _waves(columns, in_features, c.dtype), _waves(rows, out_features, c.dtype)
    return LowRank(lora_a, lora_b.T, scaling / (in_features * out_features), torch.cat((c, -c)))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept serves training too
def places(size: int, n: int, seed: int) -> Tensor:
    """row · in + column of each entry. Kept, since layers of one size have the same, of in · out numbers."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].clone()


def _waves(frequencies: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[cos; sin](2π f t/length), t < length; the product is reduced before it is rounded."""
    turns = frequencies[:, None] * torch.arange(length, device=frequencies.device) % length
    angles = turns.to(dtype) * (2 * math.pi / length)
    return torch.cat((angles.cos(), angles.sin()))
