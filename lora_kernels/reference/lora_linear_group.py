"""y_i = x W_iᵀ + b_i + s_i · ((drop_i(x) A_iᵀ) ⊙ g_i) B_iᵀ: one linear of the group after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora_linear import lora_linear, lora_linear_backward


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    seeds: Tensor | None,
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
) -> list[Tensor]:
    """The forward op of ``_ops.py``: y of each, h of each, the keep bits of those that drop."""
    drawn = iter(() if seeds is None else seeds.split(1))
    tensors = zip(weights, lora_as, lora_bs, biases, gates, strict=True)
    results = [
        lora_linear(x, *member, None, next(drawn) if p > 0.0 else None, s, p)
        for member, s, p in zip(tensors, scalings, dropout_ps, strict=True)
    ]
    ys, hs, masks = zip(*results, strict=True)
    return [*ys, *hs, *(mask for mask, p in zip(masks, dropout_ps, strict=True) if p > 0.0)]


def lora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    wide = torch.promote_types(dys[0].dtype, torch.float32)
    dx = dys[0].new_zeros(dys[0].shape[0], lora_as[0].shape[1], dtype=wide) if needs[0] else None
    grads = []
    members = zip(dys, lora_as, lora_bs, hs, gates, masks, scalings, dropout_ps, strict=True)
    for i, (dy, a, b, h, gate, mask, s, p) in enumerate(members):
        asked = [needs[0], *needs[3 * i + 1 : 3 * i + 4], False]
        given = lora_linear_backward(dy, x, None, a, b, h, gate, mask, s, p, False, asked)
        if needs[0]:
            dx.add_(given.pop(0))
        grads += given
    return grads if dx is None else [accumulate(dx.to(dys[0].dtype), dys, weights), *grads]


def accumulate(dx: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
    """dx + Σ dY_i W_i over the weights that are there, in place: each product adds itself."""
    for dy, weight in zip(dys, weights, strict=True):
        if weight is not None:
            dx.addmm_(dy, weight)
    return dx
