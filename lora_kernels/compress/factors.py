"""Two factors in place of a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn.low_rank import LowRankLinear
from ..optim._common import check_count


def truncate_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W = U S Vᵀ, A = √S_k V_kᵀ ``[k, in]``, B = U_k √S_k ``[out, k]``

    Nothing of rank k is nearer to W than B A.

    Raises:
        TypeError: the rank is no int.
        ValueError: W is no matrix, or the rank not in 1..min(out, in).

    Examples:
        >>> weight = torch.outer(torch.arange(3.0), torch.arange(4.0))
        >>> a, b = truncate_svd(weight, rank=1)
        >>> torch.allclose(b @ a, weight, atol=1e-5)
        True
    """
    return awsvd(weight, torch.ones_like(weight[0]), rank)


@torch.no_grad()
def awsvd(weight: Tensor, squares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W D = U S Vᵀ, D = diag(√squares); A = √S_k V_kᵀ D⁻¹ ``[k, in]``, B = U_k √S_k ``[out, k]``

    ‖(W - B A) D‖ is the least there is for rank k: LoRAP's weighted decomposition (Li et al., 2024, arXiv
    2404.09695). ``squares`` ``[in]`` are the sums of x² of each input, the statistic of that name of
    :func:`lora_kernels.calibrate`; zeros count as 10⁻⁴. In at least float32, rounded once.

    Raises:
        TypeError: the rank is no int.
        ValueError: W is no matrix, ``squares`` of another length or negative, or the rank out of
            1..min(out, in).

    Examples:
        >>> a, b = awsvd(torch.randn(6, 8), torch.rand(8) + 0.1, rank=3)
        >>> a.shape, b.shape
        (torch.Size([3, 8]), torch.Size([6, 3]))
    """
    check_count("rank", rank)
    if weight.dim() != 2 or rank > min(weight.shape):
        raise ValueError(f"rank: expected at most the sides of W {tuple(weight.shape)}, got {rank}")
    if squares.shape != weight.shape[1:] or not bool((squares >= 0).all()):
        raise ValueError(
            f"squares: expected {weight.shape[1]} numbers of at least 0, got shape {tuple(squares.shape)}"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.where(squares > 0, squares, 1e-4).to(weight.device, wide).sqrt()
    u, s, vh = torch.linalg.svd(weight.to(wide) * scale, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank] / scale).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


@torch.no_grad()
def factorise(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replaces linears by :class:`lora_kernels.nn.LowRankLinear` of these ranks, by :func:`truncate_svd`

    Args:
        model: changed in place.
        ranks: dotted name of an ``nn.Linear`` → its rank.

    Raises:
        TypeError: no module, or a rank that is no int.
        ValueError: a name that is no linear's, or a rank above its sides; nothing is changed.

    Examples:
        >>> model = factorise(nn.Sequential(nn.Linear(8, 8)), {"0": 2})
        >>> type(model[0]).__name__
        'LowRankLinear'
    """
    check_model(model)
    found = {}
    for name, rank in ranks.items():
        linear = plain_linear(model, name)
        found[name] = LowRankLinear(*truncate_svd(linear.weight, rank), linear.bias)
    for name, layer in found.items():
        put(model, name, layer)
    return model


def check_model(model: nn.Module) -> None:
    """Raises where ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def plain_linear(model: nn.Module, name: str) -> nn.Linear:
    """The ``nn.Linear`` called ``name``.

    Raises:
        ValueError: there is none.
    """
    found = dict(model.named_modules()).get(name)
    if type(found) is not nn.Linear:
        got = "nothing" if found is None else type(found).__name__
        raise ValueError(f"model: {name}: expected an nn.Linear, got {got}")
    return found


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer into the place of the one called ``name``."""
    parent, _, last = name.rpartition(".")
    layer.train(model.training)
    setattr(model.get_submodule(parent), last, layer)
