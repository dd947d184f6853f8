"""y_i = x W_iᵀ + b_i + s_i · ((drop_i(x) A_iᵀ) ⊙ g_i) B_iᵀ: one linear of the group after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import GroupBackward, GroupInputs, LoraBackward, LoraInputs, flat
from .lora_linear import lora_linear, lora_linear_backward


@flat(GroupInputs)
def lora_linear_group(inputs: GroupInputs) -> list[Tensor]:
    """The forward op of ``_ops.py``: y of each, h of each, the keep bits of those that drop."""
    x, weights, lora_as, lora_bs, biases, gates, seeds, scalings, dropout_ps = inputs
    drawn = iter(() if seeds is None else seeds.split(1))
    tensors = zip(weights, lora_as, lora_bs, biases, gates, strict=True)
    results = [
        lora_linear(*LoraInputs(x, *member, None, next(drawn) if p > 0.0 else None, s, p))
        for member, s, p in zip(tensors, scalings, dropout_ps, strict=True)
    ]
    ys, hs, masks = zip(*results, strict=True)
    return [*ys, *hs, *(mask for mask, p in zip(masks, dropout_ps, strict=True) if p > 0.0)]


@flat(GroupBackward)
def lora_linear_group_backward(saved: GroupBackward) -> list[Tensor]:
    """The backward op of ``_ops.py``: the gradients that ``needs`` asks for."""
    dys, x, weights, needs = saved.dys, saved.x, saved.weights, saved.needs
    wide = torch.promote_types(dys[0].dtype, torch.float32)
    shape = (dys[0].shape[0], saved.lora_as[0].shape[1])
    dx = dys[0].new_zeros(shape, dtype=wide) if needs[0] else None
    grads = []
    members = zip(*saved[3:-1], strict=True)
    for i, (dy, (a, b, h, gate, mask, s, p)) in enumerate(zip(dys, members, strict=True)):
        asked = [needs[0], *needs[3 * i + 1 : 3 * i + 4], False]
        given = lora_linear_backward(*LoraBackward(dy, x, None, a, b, h, gate, mask, s, p, False, asked))
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
