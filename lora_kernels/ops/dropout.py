"""Dropout by the package's own bits: what torch draws one number after the other, all cores draw at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.dropout import dropout_apply, keep_of
from . import _dispatch


def dropped(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """x ⊙ keep / (1 - p), each number kept with probability 1 - p; without a seed by torch's generator."""
    if p == 0.0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return dropout_apply(rows, _mask(rows, p, seed), p).view(x.shape)


def keep_scale(like: Tensor, p: float) -> Tensor:
    """keep / (1 - p) in the shape and dtype of ``like``: a factor, whose backward pass is one product."""
    rows = like.detach().reshape(-1, like.shape[-1])
    keep = keep_of(_mask(rows, p, None), rows.shape[1])
    return keep.to(like.dtype).mul_(1.0 / (1.0 - p)).view(like.shape)


def _mask(rows: Tensor, p: float, seed: Tensor | None) -> Tensor:
    seed = _dispatch.draw_seed(rows) if seed is None else seed
    mask: Tensor = torch.ops.lora_kernels.dropout_mask.default(seed, *rows.shape, p)
    return mask
