"""Dropout by the package's own bits: what torch draws one number after the other, all cores draw at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.dropout import dropout_apply
from . import _dispatch


def dropped(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """x ⊙ keep / (1 - p), each number kept with probability 1 - p; without a seed by torch's generator."""
    if p == 0.0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    seed = _dispatch.draw_seed(x) if seed is None else seed
    mask = torch.ops.lora_kernels.dropout_mask.default(seed, *rows.shape, p)
    return dropout_apply(rows, mask, p).view(x.shape)
