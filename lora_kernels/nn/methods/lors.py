"""LORS: layers of a stack that share a weight, each with a low-rank residual of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.lora_linear import lora_linear


class LORSLinear(nn.Module):
    """y = x (W + Σ_k B_k A_k)ᵀ + b, W one for all layers of the stack

    LORS (Li et al., 2024, arXiv 2403.04303), static. W, A, B and b all train, and W's gradient is the sum
    over the layers. The k products lie side by side: ``lora_A`` is ``[k r, in]``, Kaiming-uniform, and
    ``lora_B`` ``[out, k r]`` starts at zero, so that all layers start as the shared one. :meth:`stack`
    makes them.
    """

    bias: nn.Parameter | None

    def __init__(self, shared: nn.Linear, r: int = 8, k: int = 1) -> None:
        super().__init__()
        _check(r=r, k=k)
        self.in_features, self.out_features = shared.in_features, shared.out_features
        self.weight = shared.weight
        self.bias = None if shared.bias is None else nn.Parameter(shared.bias.detach().clone())
        kind: dict[str, Any] = {"device": shared.weight.device, "dtype": shared.weight.dtype}
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(k * r, shared.in_features, **kind)))
        self.lora_B = nn.Parameter(torch.zeros(shared.out_features, k * r, **kind))

    @classmethod
    def stack(cls, shared: nn.Linear, layers: int, r: int = 8, k: int | list[int] = 1) -> nn.ModuleList:
        """``layers`` of them on one weight, with k residuals each, or as a list says for each.

        Raises:
            ValueError: a number below 1, or a list of another length.
        """
        return nn.ModuleList(cls(shared, r, one) for one in _each(layers, k))

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in]``."""
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, 1.0, self.bias)


class LORSMixing(nn.Module):
    """y_q = x_q M(q), M(q) = M_c(q) + Σ_k L_k E_k(q) R_k, for each query q

    LORS (Li et al., 2024, arXiv 2403.04303), adaptive: AdaMixer's mixing of channels (its mixing of points is
    this on x transposed). M_c ``[p, m]`` is a linear of q that all layers share, E_k ``[r, r]`` are one of
    this layer; both start at zero but for M_c's bias. L_k ``[p, r]`` and R_k ``[r, m]`` are Kaiming-uniform.
    No matrix of p × m is formed but M_c's own.
    """

    def __init__(self, shared: nn.Linear, rows: int, r: int = 8, k: int = 1) -> None:
        super().__init__()
        _check(r=r, k=k, rows=rows)
        if shared.out_features % rows:
            got = shared.out_features
            raise ValueError(f"rows: expected a divisor of the shared linear's {got} outputs, got {rows}")
        self.shared, self.rows, self.columns = shared, rows, shared.out_features // rows
        self.r, self.k = r, k
        kind: dict[str, Any] = {"device": shared.weight.device, "dtype": shared.weight.dtype}
        self.cores = nn.Linear(shared.in_features, k * r * r, **kind)
        nn.init.zeros_(self.cores.weight)
        nn.init.zeros_(self.cores.bias)
        self.left = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(k * r, rows, **kind)))
        self.right = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(k * r, self.columns, **kind)))

    @classmethod
    def stack(
        cls, queries: int, rows: int, columns: int, layers: int, r: int = 8, k: int | list[int] = 1
    ) -> nn.ModuleList:
        """``layers`` of them on one M_c, a linear of q ``[queries]`` whose weight starts at zero.

        Raises:
            ValueError: a number below 1, or a list of another length.
        """
        shared = nn.Linear(queries, rows * columns)
        nn.init.zeros_(shared.weight)
        return nn.ModuleList(cls(shared, rows, r, one) for one in _each(layers, k))

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """y ``[..., points, m]`` for x ``[..., points, p]`` and q ``[..., queries]``."""
        whole = self.shared(query).unflatten(-1, (self.rows, self.columns))
        cores = self.cores(query).unflatten(-1, (self.k, self.r, self.r))
        h = (x @ self.left.T).unflatten(-1, (self.k, self.r))
        h = torch.einsum("...nkr,...krs->...nks", h, cores).flatten(-2)
        return x @ whole + h @ self.right


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _each(layers: int, k: int | list[int]) -> list[int]:
    _check(layers=layers)
    counts = k if isinstance(k, list) else [k] * layers
    if len(counts) != layers:
        raise ValueError(f"k: expected {layers} numbers, one a layer, got {len(counts)}")
    return counts
