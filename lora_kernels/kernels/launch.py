"""What every launcher needs: arguments in the form that the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Tile


def precision(dtype: torch.dtype) -> str:
    """tf32 only where torch's own fp32 matmuls may use it."""
    allowed = dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def unit_columns(tensor: Tensor) -> Tensor:
    """Rows may be strided; the kernels read along them in 16-byte steps."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def gate_argument(gate: Tensor | None) -> tuple[Tensor | None, int]:
    """The gate with unit stride and its row stride: 0 where all rows share it."""
    if gate is None:
        return None, 0
    if gate.dim() == 1:
        return gate.contiguous(), 0
    gate = unit_columns(gate)
    return gate, gate.stride(0)


def blocks(tile: Tile) -> dict[str, int]:
    """The tile as keyword arguments of a launch."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_c,
        "BLOCK_R": tile.block_r,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
