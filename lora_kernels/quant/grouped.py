"""Codes of groups with an offset each: uniform int4, and NF4 that keeps the most of its entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import nearest, nf4_table
from .quantize import quantize
from .weight import QuantizedWeight

# 1 / Φ⁻¹(0.9677083), the width of NF4's normal.
_SIGMA = 0.541


@torch.no_grad()
def quantize_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """W[o, j] ≈ α[o, l] · q[o, j] + t[o, l], l = j // group: q of 0..15 between a group's least and largest

    The base of QA-LoRA (Xu et al., 2023, arXiv 2309.14717), whose float zeros are z = -t/α.

    Args:
        weight: ``[N, K]``.
        group: how many columns share α and t; an even number that divides K.

    Returns:
        q, two in a byte, the first in its high half ``[N, K/2]``; α and t, float32 ``[N, K/group]``.

    Raises:
        ValueError: no matrix, or ``group`` is odd or does not divide K.

    Examples:
        >>> codes, scales, zeros = quantize_int4(torch.randn(4, 64))
        >>> codes.shape
        torch.Size([4, 32])
    """
    groups = _groups(weight, group)
    least, largest = groups.amin(-1), groups.amax(-1)
    scales = (largest - least) / 15
    safe = torch.where(scales > 0, scales, 1.0)
    codes = ((groups - least[..., None]) / safe[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales, least


def int4_values(codes: Tensor) -> Tensor:
    """The q of packed codes ``[N, K/2]``, uint8 ``[N, K]``."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(1)


@torch.no_grad()
def icq_quantize(
    weight: Tensor, block: int = 64, width: float = 0.1, count: int = 100, double_quant: bool = False
) -> tuple[QuantizedWeight, Tensor]:
    """W ≈ NF4(W - t) + t, t of each block the one of 2·count + 1 whose codes have the largest entropy

    Information calibration quantization of IR-QLoRA (Qin et al., 2024, arXiv 2402.05445): the candidates are
    median + f · max |w - median| for f in [-width σ, width σ]. The paper stores t in 8 bits; here it is
    float32.

    Args:
        weight: ``[N, K]``.
        block: consecutive columns that share a scale and t; as of :func:`quantize`, and a divisor of K.
        width: λ.
        count: candidates on each side of the median.
        double_quant: as of :func:`quantize`.

    Returns:
        The codes of W - t, and t, float32 ``[N, K/block]``.

    Raises:
        ValueError: no matrix, or ``block`` does not divide K.

    Examples:
        >>> quantised, offsets = icq_quantize(torch.randn(4, 64), count=3)
    """
    groups = _groups(weight, block)
    middle = groups.median(-1).values
    reach = (groups - middle[..., None]).abs().amax(-1)
    best, chosen = torch.full_like(middle, -1.0), middle
    for factor in torch.linspace(-width * _SIGMA, width * _SIGMA, 2 * count + 1).tolist():
        offsets = middle + factor * reach
        entropy = nf4_entropy(groups - offsets[..., None])
        better = entropy > best
        best, chosen = torch.where(better, entropy, best), torch.where(better, offsets, chosen)
    rest = (groups - chosen[..., None]).view(weight.shape).to(weight.dtype)
    return quantize(rest, "nf4", block_size=block, double_quant=double_quant), chosen


def nf4_entropy(blocks: Tensor) -> Tensor:
    """Bits of entropy of the NF4 codes of blocks ``[..., block]``."""
    scaled = blocks / blocks.abs().amax(-1, keepdim=True).clamp(min=1e-38)
    codes = nearest(scaled.contiguous(), nf4_table(blocks.device))
    counts = blocks.new_zeros(*blocks.shape[:-1], 16).scatter_add(-1, codes, torch.ones_like(blocks))
    shares = counts / blocks.shape[-1]
    return -(shares * shares.clamp(min=1e-38).log2()).sum(-1)


def _groups(weight: Tensor, group: int) -> Tensor:
    """W as float32 ``[N, K/group, group]``."""
    if weight.dim() != 2 or group < 2 or group % 2 or weight.shape[1] % group:
        raise ValueError(
            "weight: expected [N, K] with K a multiple of an even group, got shape"
            f" {tuple(weight.shape)} and groups of {group}"
        )
    return weight.detach().float().unflatten(1, (-1, group))
