"""‖w_n + s b_n A‖ for each row n, in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The op of ``_ops.py``: the sum is formed whole, in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scaling)
    return torch.linalg.vector_norm(total, dim=1)
