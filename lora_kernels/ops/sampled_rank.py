"""Low rank with a normal draw between the factors, beside a linear: PVeRA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class SampledRank(Branch):
    """y += (μ + exp(l / 2) ⊙ ε) Bᵀ with [μ | l] = (x Aᵀ) ⊙ d

    A ``[2 r, in]`` and ε ``[rows, r]`` are constants, d ``[2 r]`` and B ``[out, r]`` have gradients. x is not
    saved, and the one pass over dX is the base product's.
    """

    writes = True

    def add_(
        self,
        y: Tensor,
        x: Tensor,
        lora_a: Tensor,
        gate: Tensor,
        noise: Tensor,
        lora_b: Tensor,
        write: bool = False,
    ) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        u = x @ lora_a.T
        mean, log_variance = (u * gate).chunk(2, 1)
        spread = (0.5 * log_variance).exp_().mul_(noise)
        h = mean + spread
        y.addmm_(h, lora_b.T, beta=0 if write else 1)
        return u, spread, h, lora_a, gate, lora_b

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of d and B."""
        u, spread, h, lora_a, gate, lora_b = saved
        dh = dy @ lora_b
        du = torch.cat([dh, dh * spread * 0.5], 1)
        d_gate = (du * u).sum(0) if needs[1] else None
        if dx is not None:
            dx.addmm_(du * gate, lora_a, beta=0 if write else 1)
        return [None, d_gate, None, dy.T @ h if needs[3] else None]
