"""Low rank that trains, and beside it what stays as it is, in one linear: OSF's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class MovedRank(Branch):
    """y += (x Aᵀ) Bᵀ + (x A₀ᵀ) B₀ᵀ

    A ``[r, in]`` and B ``[out, r]`` have gradients; A₀ ``[r₀, in]`` and B₀ ``[out, r₀]`` are constants, which
    side by side with the others would get theirs computed too.
    """

    writes = True

    def add_(
        self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, *constant: Tensor, write: bool = False
    ) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        a0, b0 = constant
        h = x @ lora_a.T
        y.addmm_(x @ a0.T, b0.T, beta=0 if write else 1)
        y.addmm_(h, lora_b.T)
        return x, h, lora_a, lora_b, a0, b0

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of A and B."""
        x, h, lora_a, lora_b, a0, b0 = saved
        dh = dy @ lora_b
        if dx is not None:
            dx.addmm_(dy @ b0, a0, beta=0 if write else 1)
            dx.addmm_(dh, lora_a)
        return [dh.T @ x if needs[0] else None, dy.T @ h if needs[1] else None, None, None]
