"""What every launcher needs: arguments in the form that the kernels take them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _backend
from .config import Tile, stages


def precision(dtype: torch.dtype) -> str:
    """tf32 only where torch's own fp32 matmuls may use it."""
    # `get_float32_matmul_precision` raises where the setting was made through this newer name.
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def has_descriptors(device: torch.device) -> bool:
    """Whether tensor descriptors are a copy engine's work there (sm_90 and later), or interpreted."""
    if device.type != "cuda":
        return _backend.interpreting()
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def processors(device: torch.device) -> int:
    """The programs of a persistent grid: one a multiprocessor; three where they are interpreted."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


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
        "num_stages": stages(tile, torch.version.hip is not None),
    }
