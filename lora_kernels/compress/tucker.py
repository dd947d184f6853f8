"""Tucker-2: a convolution's kernel as a small one between two of width 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROUNDS = 10


@torch.no_grad()
def tucker2(weight: Tensor, ranks: tuple[int, int], rounds: int = _ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """W ≈ core ×₁ U_o ×₂ U_i by higher-order orthogonal iteration

    Started from the singular vectors of the two unfoldings, each factor in turn becomes those of W with the
    other one taken out, which never makes ‖W - Ŵ‖ larger. In at least float32, rounded once.

    Args:
        weight: W ``[out, in, ...]``.
        ranks: (R_o, R_i).
        rounds: of the iteration.

    Returns:
        core ``[R_o, R_i, ...]``, U_o ``[out, R_o]`` and U_i ``[in, R_i]``, whose columns are orthonormal.

    Raises:
        ValueError: W has fewer than two dimensions, or a rank is out of range.

    Examples:
        >>> core, outer, inner = tucker2(torch.randn(6, 5, 3, 3), ranks=(2, 2))
        >>> core.shape
        torch.Size([2, 2, 3, 3])
    """
    for place, rank in enumerate(ranks):
        if weight.dim() < 2 or not 1 <= rank <= weight.shape[place]:
            raise ValueError(f"ranks: expected 1 to the first sizes of W {tuple(weight.shape)}, got {ranks}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wide = wide.reshape(*wide.shape[:2], -1)
    outer, inner = _leading(wide, 0, ranks[0]), _leading(wide, 1, ranks[1])
    for _ in range(rounds):
        outer = _leading(torch.einsum("oik,ij->ojk", wide, inner), 0, ranks[0])
        inner = _leading(torch.einsum("oik,oj->jik", wide, outer), 1, ranks[1])
    core = torch.einsum("oik,op,iq->pqk", wide, outer, inner)
    core = core.reshape(*ranks, *weight.shape[2:])
    return core.to(weight.dtype), outer.to(weight.dtype), inner.to(weight.dtype)


def tucker2_weight(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """core ×₁ U_o ×₂ U_i ``[out, in, ...]``.

    Examples:
        >>> weight = torch.randn(6, 5)
        >>> torch.allclose(tucker2_weight(*tucker2(weight, ranks=(5, 5))), weight, atol=1e-4)
        True
    """
    return torch.einsum("pq...,op,iq->oi...", core, outer, inner)


def _leading(tensor: Tensor, dim: int, rank: int) -> Tensor:
    """The first left singular vectors of an unfolding ``[size, rank]``, whatever its other size is."""
    rows = tensor.movedim(dim, 0).flatten(1)
    return torch.linalg.svd(rows, full_matrices=rank > min(rows.shape)).U[:, :rank]


def tucker2_conv(conv: Any, core: Tensor, outer: Tensor, inner: Tensor) -> nn.Sequential:
    """y = U_o * (core * (U_iᵀ * x)) + b: convolutions of width 1, of the kernel's and of 1 again

    Raises:
        ValueError: a convolution with groups.

    Examples:
        >>> conv = nn.Conv2d(5, 6, 3)
        >>> tucker2_conv(conv, *tucker2(conv.weight, ranks=(2, 2)))(torch.randn(1, 5, 8, 8)).shape
        torch.Size([1, 6, 6, 6])
    """
    if conv.groups != 1:
        raise ValueError(f"conv: expected one without groups, got {conv.groups} groups")
    kind, ones = type(conv), (1,) * (core.dim() - 2)
    where: Any = {"device": core.device, "dtype": core.dtype}
    options: Any = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    first = kind(conv.in_channels, core.shape[1], ones, bias=False, **where)
    middle = kind(core.shape[1], core.shape[0], conv.kernel_size, bias=False, **options, **where)
    last = kind(core.shape[0], conv.out_channels, ones, bias=conv.bias is not None, **where)
    with torch.no_grad():
        first.weight.copy_(inner.T.reshape(first.weight.shape))
        middle.weight.copy_(core)
        last.weight.copy_(outer.reshape(last.weight.shape))
        if conv.bias is not None:
            last.bias.copy_(conv.bias)
    return nn.Sequential(first, middle, last)
