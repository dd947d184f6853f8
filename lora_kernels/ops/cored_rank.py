"""Low rank with a core between two frozen factors, beside a linear: TinyLoRA's and PSOFT's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .branched_linear import Branch


@dataclass(frozen=True)
class CoredRank(Branch):
    """y += s · (x Aᵀ) Cᵀ Bᵀ

    A ``[r, in]`` and B ``[out, r]`` are constants, C ``[r, r]`` has a gradient: one of [rows, r], where C
    taken into B would have the product of one as wide as y. x is not saved.
    """

    writes = True

    # s.
    scaling: float

    @property
    def in_cpp(self) -> Any:
        """csrc/cpu/thin_branch_autograd.cpp."""
        return functools.partial(
            torch.ops.lora_kernels.cpp_cored_linear_autograd.default, scaling=self.scaling
        )

    def add_(
        self, y: Tensor, x: Tensor, lora_a: Tensor, core: Tensor, lora_b: Tensor, write: bool = False
    ) -> tuple[Tensor, ...]:
        """Adds it for rows x; with ``write`` into memory that nobody has filled."""
        h = x @ lora_a.T
        y.addmm_(h @ core.T, lora_b.T, beta=0 if write else 1, alpha=self.scaling)
        return h, lora_a, core, lora_b

    def gradients(
        self, dy: Tensor, dx: Tensor | None, needs: Sequence[bool], *saved: Any, write: bool = False
    ) -> list[Any]:
        """Of C."""
        h, lora_a, core, lora_b = saved
        turned = (dy @ lora_b).mul_(self.scaling)
        if dx is not None:
            dx.addmm_(turned @ core, lora_a, beta=0 if write else 1)
        return [None, turned.T @ h if needs[1] else None, None]
