"""QuanTA: a chain of gates on pairs of axes of x."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.gate_chain import GateChain
from ..base import register
from ..call import Call
from ..site import Site, Start
from ..update import Branched
from .base import Structured

_AXES = 4


@register("quanta")
class QuanTA(Structured):
    """ΔW = 𝒯(θ) - 𝒯(θ₀), 𝒯 = the gates of all pairs of axes one after the other

    QuanTA (Chen et al., 2024, arXiv 2406.00132). x is seen as ``[..., d_1, …, d_N]``, padded with zeros to
    Πd; the gate of a pair is ``[d_j d_i, d_j d_i]``, on axes (-1,-2), (-1,-3), …, (-2,-3), …; y is cut or
    padded. ``method_options={"dims": (16, 8, 8, 4)}``; by default ``in_features`` in four factors, as near
    each other as can be. No scale; r and α are not used. Σ (d_i d_j)² parameters, ΔW of any rank.

    The gates start at U(±√(3/(d_i d_j))), and 𝒯(θ₀) is taken out of W once, so that the base goes on as
    W - 𝒯(θ₀). That start follows from the layer's name, its sizes and the option ``seed`` (0) alone: a
    loaded adapter takes out the same. A quantised base cannot be.

    Raises:
        ValueError: fewer than two dims, one below 1, or a product below ``in_features``.
    """

    options = frozenset({"dims", "seed"})
    over_quantized = False

    def build(self, site: Site) -> Start:
        """The gates, and W without what they make."""
        self.branch = GateChain(site.out_features, _dims(site))
        generator = torch.Generator().manual_seed(
            zlib.crc32(site.name.encode()) + site.whole_option("seed", 0, 0)
        )
        gates = []
        for pair in self.branch.pairs:
            size = self.branch.size(pair)
            drawn = torch.empty(size, size, dtype=site.dtype)
            gates.append(nn.init.uniform_(drawn, -math.sqrt(3 / size), math.sqrt(3 / size), generator))
        tensors = {f"gate_{i}": gate.to(site.device) for i, gate in enumerate(gates)}
        return Start(tensors, None if site.weight is None else site.weight - self._made(site, tensors))

    def _made(self, site: Site, gates: dict[str, Tensor]) -> Tensor:
        """𝒯(θ₀) [out, in]; the one time that it is made."""
        eye = torch.eye(site.in_features, dtype=site.dtype, device=site.device)
        columns = eye.new_zeros(site.in_features, site.out_features)
        self.branch.add_(columns, eye, *gates.values())
        return columns.T

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Branched:
        """The chain on x."""
        gates: list[Any] = [getattr(self, f"gate_{i}") for i in range(len(self.branch.pairs))]
        return self.branched(x, self.branch, *gates)


def _dims(site: Site) -> tuple[int, ...]:
    dims = site.option("dims", None) or balanced(site.in_features)
    good = isinstance(dims, (list, tuple)) and len(dims) > 1
    good = good and all(isinstance(d, int) and d > 0 for d in dims)
    if not good or math.prod(dims) < site.in_features:
        raise ValueError(
            f"dims: quanta expects two or more sizes of product in_features = {site.in_features} or more,"
            f" got {dims}"
        )
    return tuple(dims)


def balanced(size: int) -> tuple[int, ...]:
    """``size`` as a product of four, the largest prime always into the smallest factor."""
    dims, primes, p = [1] * _AXES, [], 2
    while size > 1:
        while size % p == 0:
            primes.append(p)
            size //= p
        p += 1
    for prime in reversed(primes):
        dims.sort()
        dims[0] *= prime
    wide = [d for d in dims if d > 1]
    return tuple(sorted(wide + [1] * (2 - len(wide)), reverse=True))
