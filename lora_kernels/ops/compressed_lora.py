"""LoRA that keeps, of x, one number a group of features for the gradient of A: VeLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class CompressedLora(Branch):
    """y += s · (x Aᵀ) Bᵀ, with dA = t · dhᵀ x̃ of x̃ = (x_g · v) v for each group g of features

    VeLoRA (Miles et al., 2024, arXiv 2405.17991). The tensors are A ``[r, K]``, B ``[N, r]`` and a direction
    v of K / groups numbers, rounded up, which takes no gradient. What is kept of x is c, the ``groups``
    products of a row with v; x̃ is never made, since dhᵀ x̃ is (dhᵀ c) ⊗ v. All other gradients are LoRA's.
    """

    groups: int
    # s.
    scaling: float
    # t.
    gradient_scale: float

    def add_(self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Adds it for rows x."""
        h = x @ lora_a.T
        y.addmm_(h, lora_b.T, alpha=self.scaling)
        padded = F.pad(x, (0, len(v) * self.groups - x.shape[1]))
        return padded.unflatten(1, (self.groups, -1)) @ v, h, lora_a, lora_b, v

    def gradients(self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any) -> list[Any]:
        """Of A and B."""
        compressed, h, lora_a, lora_b, v = saved
        dh = self.scaling * (dy @ lora_b)
        if dx is not None:
            dx.addmm_(dh, lora_a)
        da = None
        if needs[0]:
            of_groups = self.gradient_scale * (dh.T @ compressed)
            da = (of_groups[..., None] * v).flatten(1)[:, : lora_a.shape[1]]
        return [da, self.scaling * (dy.T @ h) if needs[1] else None, None]
