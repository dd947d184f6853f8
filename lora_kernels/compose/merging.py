"""How adapters of one linear become one: PEFT's kinds of merging, on factors and on whole updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]  # A [r, in], B [out, r] and s

# Kind -> which values are dropped first, and whether a majority of signs is elected.
_RULES: dict[str, tuple[str | None, bool]] = {
    "linear": (None, False),
    "ties": ("small", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("small", False),
}
KINDS = ("cat", "svd", *_RULES, *(f"{name}_svd" for name in _RULES if name != "linear"))
_SIGNS = ("total", "frequency")


class Merging(NamedTuple):
    """How adapters are merged; see :func:`~lora_kernels.compose.add_weighted_adapter`.

    With weights w_i and ΔW_i = s_i B_i A_i:

    ``cat``: [w_i s_i A_i] and [B_i] side by side, which is Σ w_i ΔW_i; ``svd``: the best r ranks of that;
    ``linear``: Σ sign √|w_i s_i| A_i and Σ √|w_i s_i| B_i, which is not. ``magnitude_prune``: of each tensor
    the largest |values| alone; ``ties``: these, and of each element those of its majority's sign, whose mean
    is taken; ``dare_linear`` and ``dare_ties``: values dropped at random, the others divided by the density.
    These on A and on B, or with ``_svd`` on each ΔW_i.
    """

    kind: str = "svd"
    # The part of the values that is kept.
    density: float | None = None
    # Whether the majority of an element is of Σ values ("total") or of Σ signs ("frequency").
    majority_sign_method: str = "total"
    # Of the SVD's result; by default the largest rank among the adapters.
    svd_rank: int | None = None
    # The quantile of the result's numbers at which they are clamped.
    svd_clamp: float | None = None
    # Draws what "dare" drops; by default torch's own, which PEFT draws with.
    generator: torch.Generator | None = None

    def checked(self) -> Merging:
        """Itself.

        Raises:
            ValueError: an option is out of range.
        """
        for name, value, choices in (
            ("combination_type", self.kind, KINDS),
            ("majority_sign_method", self.majority_sign_method, _SIGNS),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        needed = self.rule[0] is not None
        if needed and not (self.density is not None and 0 < self.density <= 1):
            raise ValueError(f"density: {self.kind} expects a number above 0, at most 1, got {self.density}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank: expected at least 1, got {self.svd_rank}")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp: expected a quantile of 0 to 1, got {self.svd_clamp}")
        return self

    @property
    def on_updates(self) -> bool:
        """Whether ΔW_i are merged, and not A_i and B_i."""
        return self.kind.endswith("svd")

    @property
    def rule(self) -> tuple[str | None, bool]:
        """What is dropped, and whether signs are elected."""
        return _RULES.get(self.kind.removesuffix("_svd"), (None, False))


def merge_factors(
    factors: Sequence[Factors], weights: Sequence[float], how: Merging
) -> tuple[Tensor, Tensor]:
    """A and B of the merged adapter of one linear, whose s is 1: ``cat``, ``svd`` and the kinds on A and B.

    ``svd`` decomposes two triangles of Σ r_i rows and forms no ΔW.

    Raises:
        ValueError: the ranks differ where A and B are added.

    Examples:
        >>> factors = [(torch.randn(2, 8), torch.randn(4, 2), 1.0) for _ in range(2)]
        >>> a, b = merge_factors(factors, [0.5, 0.5], Merging("cat"))
        >>> a.shape, b.shape
        (torch.Size([4, 8]), torch.Size([4, 4]))
    """
    scaled = [w * s for w, (_, _, s) in zip(weights, factors, strict=True)]
    lora_as, lora_bs = [a for a, _, _ in factors], [b for _, b, _ in factors]
    if how.kind in ("cat", "svd"):
        lora_a = torch.cat([w * a for w, a in zip(scaled, lora_as, strict=True)])
        lora_b = torch.cat(lora_bs, 1)
        if how.kind == "cat":
            return lora_a, lora_b
        return _truncated(lora_a, lora_b, how.svd_rank or max(map(len, lora_as)))
    ranks = {len(a) for a in lora_as}
    if len(ranks) > 1:
        raise ValueError(f"combination_type: {how.kind} expects adapters of one rank, got {sorted(ranks)}")
    roots = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
    return combine(lora_as, signed, how), combine(lora_bs, roots, how)


def combine(tensors: Sequence[Tensor], weights: Sequence[float], how: Merging) -> Tensor:
    """Σ w_i t_i by the rule of ``how``: task arithmetic, TIES (Yadav et al., 2023, arXiv 2306.01708) or DARE.

    DARE: Yu et al., 2023, arXiv 2311.03099.

    Examples:
        >>> combine([torch.ones(2), torch.ones(2)], [0.25, 0.5], Merging("linear"))
        tensor([0.7500, 0.7500])
    """
    drop, elect = how.rule
    if drop is not None and how.density is not None and how.density < 1:
        keep = _largest if drop == "small" else _random
        tensors = [keep(tensor, how.density, how.generator) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    wide = torch.promote_types(stacked.dtype, torch.float32)
    each = torch.tensor(weights, dtype=wide, device=stacked.device).view(-1, *[1] * tensors[0].dim())
    total = stacked.to(wide) * each
    if elect:
        signs = stacked.sign()
        votes = stacked.sum(0) if how.majority_sign_method == "total" else signs.sum(0)
        agrees = signs == torch.where(votes >= 0, 1, -1)
        total = total * agrees / agrees.sum(0).clamp(min=1)
    return total.sum(0).to(stacked.dtype)


def decompose(matrix: Tensor, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` of the best approximation of a matrix; the values are in B."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    lora_a, lora_b = vh[:rank], u[:, :rank] * values[:rank]
    if clamp is None:
        return lora_a, lora_b
    high = float(torch.quantile(torch.cat([lora_b.flatten(), lora_a.flatten()]), clamp))
    return lora_a.clamp(-high, high), lora_b.clamp(-high, high)


def _truncated(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`decompose` of B A, by way of the triangles of both."""
    q_a, r_a = torch.linalg.qr(lora_a.T)
    q_b, r_b = torch.linalg.qr(lora_b)
    small_a, small_b = decompose(r_b @ r_a.T, rank)
    return small_a @ q_a.T, q_b @ small_b


def _largest(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[kept] = True
    return tensor * mask.view(tensor.shape)


def _random(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density
