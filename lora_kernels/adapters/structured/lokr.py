"""LoKr: a Kronecker product, the larger factor of low rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import Added, Dense


@register("lokr")
class LoKr(Adapter):
    """ΔW = (α/r) · C₁ ⊗ C₂,  C₂ = B₂ A₂

    LoKr (LyCORIS, Yeh et al., 2023, arXiv 2309.14859). C₁ ``[l, m]`` and C₂ ``[out/l, in/m · kernel]`` train
    under PEFT's and LyCORIS' names: ``lokr_w1``, and ``lokr_w2_a``, ``lokr_w2_b`` or, where 2 r is at least
    the larger side of C₂, ``lokr_w2`` whole. l and m are the divisors that ``decompose_factor`` says, -1 (the
    default) for the nearest to a square, or for a layer by name ``sizes={name: [l, m]}``; with
    ``decompose_both`` C₁ is of rank r too. C₁ starts at zero (``init_lora_weights=False``: random). On a
    linear no ΔW is made: x, as m rows, is multiplied by C₂ and then by C₁. A convolution's ΔW is formed.

    Raises:
        ValueError: ``decompose_factor`` is 0 or below -1, or ``sizes`` do not divide.
    """

    plain = False
    options = frozenset({"decompose_factor", "decompose_both", "sizes"})
    peft_form = PeftForm(
        "LOKR",
        {"alpha": "lora_alpha"},
        options={name: name for name in ("decompose_both", "decompose_factor")},
        implied={"sizes": None},
        constants={"use_effective_conv2d": False},
        unread=frozenset({"init_weights"}),
    )

    def build(self, site: Site) -> Start:
        """Both factors."""
        taps = math.prod(site.kernel)
        (rows, k), (m, n) = self._sizes(site, site.out_features, site.in_features // taps)
        make = site.kaiming if site.config.init_lora_weights is False else site.zeros
        if site.option("decompose_both", False) and 2 * self.r < max(rows, m):
            one = {"lokr_w1_a": make(rows, self.r), "lokr_w1_b": site.kaiming(self.r, m)}
        else:
            one = {"lokr_w1": make(rows, m)}
        if 2 * self.r >= max(k, n):
            return Start({**one, "lokr_w2": site.kaiming(k, n, *site.kernel)})
        return Start(
            {**one, "lokr_w2_a": site.kaiming(k, self.r), "lokr_w2_b": site.kaiming(self.r, n * taps)}
        )

    def _sizes(self, site: Site, out: int, cols: int) -> list[tuple[int, int]]:
        """(l, out/l) and (m, in/m)."""
        own = (site.option("sizes", None) or {}).get(site.name)
        if own is None:
            factor = site.whole_option("decompose_factor", -1, -1)
            return [divisors(size, factor) for size in (out, cols)]
        for one, size in zip(own, (out, cols), strict=True):
            if one < 1 or size % one:
                raise ValueError(f"sizes: {site.name}: expected divisors of {out} and {cols}, got {own}")
        return [(own[0], out // own[0]), (own[1], cols // own[1])]

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Added | Dense:
        """Two small products on x, or ΔW where there is none."""
        c1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        c2 = self.lokr_w2.flatten(1) if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        if x is None or self.kernel:
            return Dense(self.scaling * torch.kron(c1, c2))
        return Added(kronecker(self.drop(x), c1, c2, self.scaling))


def kronecker(x: Tensor, c1: Tensor, c2: Tensor, scaling: float) -> Tensor:
    """x (s · C₁ ⊗ C₂)ᵀ, in the dtype of x ``[..., in]``."""
    c1, c2 = c1.to(x.dtype), c2.to(x.dtype)
    rows = x.unflatten(-1, (c1.shape[1], c2.shape[1]))
    return scaling * (c1 @ (rows @ c2.T)).flatten(-2)


def divisors(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is ``size``, as PEFT chooses them.

    ``factor`` is the first, if it divides; else that is the largest divisor up to it and √size.
    """
    if factor == 0:
        raise ValueError("decompose_factor: expected a number above 0, or -1, got 0")
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(d for d in range(most, 0, -1) if size % d == 0)
    return small, size // small
