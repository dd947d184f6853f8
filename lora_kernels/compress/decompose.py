"""A layer's weight as its decomposition: two factors of a matrix, Tucker-2 of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.low_rank import LowRankLinear
from ..optim._common import check_number
from ..optim._vectors import squared_singular
from .factors import truncate_svd
from .tucker import tucker2, tucker2_conv, tucker2_weight

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adaptive_rank(weight: Tensor, eps: float) -> int:
    """The least k ≥ 1 with Σ_{i>k} σ_i² ≤ ε Σ σ_i², of the singular values of W ``[out, in]``

    Raises:
        ValueError: W is no matrix, or ε is below 0.

    Examples:
        >>> adaptive_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0])), eps=0.2)
        1
    """
    check_number("eps", eps)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}")
    energy = torch.linalg.svdvals(weight.detach().double()).square()
    tail = energy.sum() - energy.cumsum(0)
    return int((tail > eps * energy.sum()).sum().clamp(max=len(energy) - 1)) + 1


class Truncations:
    """TD_R(W) at any ranks: ``[R]`` of a matrix, ``[R_o, R_i]`` of a kernel

    A matrix is decomposed once, whatever ranks are asked for: W V_R V_Rᵀ, or U_R U_Rᵀ W, by the vectors of
    its shorter side. W is not to change meanwhile.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self._kept: tuple[Tensor, Tensor] | None = None

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            self._kept = squared_singular(self.weight)
        return self._kept

    def at(self, ranks: list[int]) -> Tensor:
        """TD_R(W), a tensor of its own."""
        if ranks == whole_ranks(self.weight):
            return self.weight.clone()
        if self.weight.dim() > 2:
            return tucker2_weight(*tucker2(self.weight, (ranks[0], ranks[1])))
        vectors = self._spectrum()[1][:, : ranks[0]]
        wide = self.weight.to(vectors.dtype)
        near = wide @ vectors @ vectors.T if len(vectors) == wide.shape[1] else vectors @ (vectors.T @ wide)
        return near.to(self.weight.dtype)

    def error(self, ranks: list[int]) -> float:
        """‖W - TD_R(W)‖², of a matrix Σ_{i>R} σ_i²."""
        if self.weight.dim() > 2:
            return float((self.weight - self.at(ranks)).square().sum())
        return float(self._spectrum()[0][ranks[0] :].sum())


def decomposable(model: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, Any]:
    """Name → each plain linear and each convolution without groups, but for those left out.

    Raises:
        ValueError: there are none, or one to leave out is none.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear or (type(layer) in CONVS and _plain(layer))
    }
    for name in exclude:
        if found.pop(name, None) is None:
            raise ValueError(f"exclude: expected layers that can be decomposed, got {name!r}")
    if not found:
        raise ValueError("model: expected linears or convolutions to decompose, got none")
    return found


def _plain(layer: Any) -> bool:
    return layer.groups == 1


def whole_ranks(weight: Tensor) -> list[int]:
    """The ranks at which nothing is lost."""
    return [min(weight.shape)] if weight.dim() == 2 else list(weight.shape[:2])


def numbers_of(weight: Tensor, ranks: list[int]) -> int:
    """How many numbers the parts have."""
    out, cols = weight.shape[:2]
    if weight.dim() == 2:
        return ranks[0] * (out + cols)
    return ranks[0] * out + ranks[1] * cols + ranks[0] * ranks[1] * weight[0, 0].numel()


def parts_of(layer: Any, ranks: list[int]) -> nn.Module:
    """The layer as two factors or three convolutions."""
    if layer.weight.dim() == 2:
        return LowRankLinear(*truncate_svd(layer.weight, ranks[0]), layer.bias)
    return tucker2_conv(layer, *tucker2(layer.weight, (ranks[0], ranks[1])))
