"""How much a training learnt and forgot, and of which rank its change of W is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..optim._common import check_count, check_number, pairs_of


class Spectrum(NamedTuple):
    """Singular values, largest first: of W before, of W after, and of their difference."""

    before: Tensor
    after: Tensor
    change: Tensor


class Balance(NamedTuple):
    """By how much a loss fell on the target, and rose on the source."""

    learnt: float
    forgotten: float


@torch.no_grad()
def spectrum(before: Tensor, after: Tensor) -> Spectrum:
    """σ(W), σ(W'), σ(W' - W), computed in at least float32

    LoRA Learns Less and Forgets Less (Biderman et al., 2024, arXiv 2405.09673).

    Raises:
        ValueError: the weights are no matrices of one shape.

    Examples:
        >>> spectrum(torch.zeros(2, 2), torch.eye(2)).change
        tensor([1., 1.])
    """
    if before.dim() != 2 or before.shape != after.shape:
        want = f"a matrix of shape {tuple(before.shape)}" if before.dim() == 2 else "matrices"
        raise ValueError(f"after: expected {want}, got {tuple(after.shape)} beside {tuple(before.shape)}")
    old, new = (one.detach().to(torch.promote_types(one.dtype, torch.float32)) for one in (before, after))
    return Spectrum(*(torch.linalg.svdvals(one) for one in (old, new, new - old)))


@torch.no_grad()
def factor_spectrum(lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """σ(s · B A) ``[r]``, without B A: those of R_B R_Aᵀ for B = Q_B R_B and Aᵀ = Q_A R_A

    Raises:
        ValueError: the ranks differ.

    Examples:
        >>> factor_spectrum(torch.eye(2, 8), torch.eye(4, 2), scaling=2.0)
        tensor([2., 2.])
    """
    if lora_a.dim() != 2 or lora_b.dim() != 2 or len(lora_a) != lora_b.shape[1]:
        raise ValueError(
            f"lora_b: expected [out, r] beside A [r, in], got {tuple(lora_b.shape)} beside"
            f" {tuple(lora_a.shape)}"
        )
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    of_b, of_a = (torch.linalg.qr(one.detach().to(wide), mode="r").R for one in (lora_b, lora_a.T))
    return torch.linalg.svdvals(of_b @ of_a.T) * abs(scaling)


def effective_rank(change: Tensor, var: float = 0.9) -> int:
    """The least k with Σ_{i≤k} σ_i² ≥ var · Σ σ_i² of ΔW ``[out, in]``, or of its σ; 0 where ΔW is zero

    "Singular vectors that explain 90 % of the variance" (Biderman et al., 2024, arXiv 2405.09673); that the
    variance is σ² is our reading. A vector is taken for singular values.

    Raises:
        ValueError: ``var`` is not in (0, 1], or ``change`` has other dimensions.

    Examples:
        >>> effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
        1
    """
    check_number("var", var, above=True)
    if var > 1:
        raise ValueError(f"var: expected at most 1, got {var}")
    if change.dim() not in (1, 2):
        raise ValueError(f"change: expected a matrix or singular values, got {change.dim()} dimensions")
    wide = change.detach().to(torch.promote_types(change.dtype, torch.float32))
    values = torch.linalg.svdvals(wide) if wide.dim() == 2 else wide.sort(descending=True).values
    energy = values.double().square()
    if not energy.any():
        return 0
    share = energy.cumsum(0) / energy.sum()
    enough = var - 4 * torch.finfo(torch.float64).eps
    return min(int((share < enough).sum()) + 1, len(share))


def effective_ranks(model: nn.Module, var: float = 0.9) -> dict[str, int]:
    """Name of each layer -> the effective rank of its s · B A, on models of :func:`apply_lora` and of PEFT

    Raises:
        TypeError: not a module.
        ValueError: there are no adapters, or one is more than s · B A.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> effective_ranks(model)  # B is zero at the start
        {'0': 0}
    """
    found = {}
    for pair in pairs_of(model):
        if not pair.plain:
            raise ValueError(
                f"model: {pair.name}: expected an adapter that is s · B A and no more, got another"
            )
        values = factor_spectrum(pair.lora_a.flatten(1), pair.lora_b.flatten(1), pair.scaling)
        found[pair.name] = effective_rank(values, var)
    return found


def learning_forgetting(
    target: tuple[float, float], source: tuple[float, float], *, higher_is_better: bool = False
) -> Balance:
    """(L_T - L_T', L_S' - L_S) of the losses before and after; of accuracies with the signs turned

    The study's axes: what is learnt of the target and forgotten of the source, which it takes as the mean
    accuracy on HellaSwag, ARC-challenge and WinoGrande.

    Args:
        target: the score before and after, on what is learnt.
        source: the same on what was known before.
        higher_is_better: whether the scores are accuracies.

    Examples:
        >>> balance = learning_forgetting(target=(2.0, 1.5), source=(1.0, 1.25))
        >>> tuple(balance)
        (0.5, 0.25)
    """
    sign = -1.0 if higher_is_better else 1.0
    return Balance(sign * (target[0] - target[1]), sign * (source[1] - source[0]))


def biderman2024(rank: int, **options: Any) -> LoRAConfig:
    """The study's recipe: all linears, α = 2r

    With it go the highest learning rate that is stable, and instructions rather than raw text: LoRA of a high
    rank comes near to full training there, and on raw text stays behind.

    Args:
        rank: r.
        options: further fields of :class:`LoRAConfig`.

    Examples:
        >>> biderman2024(16).lora_alpha
        32
    """
    check_count("rank", rank)
    return LoRAConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **options})
