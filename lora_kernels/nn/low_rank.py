"""A linear that has two factors and no W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear


class LowRankLinear(nn.Module):
    """y = (x Aᵀ) Bᵀ + b

    What a compressed ``nn.Linear`` becomes: rank · (in + out) numbers, and as many operations a row. A
    ``[rank, in]``, B ``[out, rank]`` and b ``[out]`` train.

    Args:
        lora_a: A.
        lora_b: B, of A's dtype.
        bias: b, or ``None``.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_b.shape[1] != lora_a.shape[0]:
            got = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            raise ValueError(f"lora_a, lora_b: expected shapes [rank, in] and [out, rank], got {got}")
        if bias is not None and bias.shape != lora_b.shape[:1]:
            raise ValueError(f"bias: expected shape {tuple(lora_b.shape[:1])}, got {tuple(bias.shape)}")
        self.down, self.up = (_parameter(one) for one in (lora_a, lora_b))
        self.bias = None if bias is None else _parameter(bias)

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return self.up.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in]``."""
        return lora_linear(x, None, self.down, self.up, 1.0, self.bias)

    @torch.no_grad()
    def extended(self, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> LowRankLinear:
        """y = (x [A; A']ᵀ) [B, s B']ᵀ + b: a LoRA beside it, in the same two products."""
        return LowRankLinear(
            torch.cat([self.down, lora_a]), torch.cat([self.up, scaling * lora_b], 1), self.bias
        )

    def extra_repr(self) -> str:
        """Its sizes."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


def _parameter(tensor: Any) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())
