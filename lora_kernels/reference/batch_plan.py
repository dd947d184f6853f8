"""The slots of a batch sorted by adapter, and cut into tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import TILE_SLOTS


def batch_plan(
    adapter_ids: Tensor, adapters: int, ids: Tensor, order: Tensor, offsets: Tensor, tiles: Tensor
) -> None:
    """The op of ``_ops.py``: fills the four buffers of a ``BatchPlan``."""
    ids.fill_(adapters)[: len(adapter_ids)] = adapter_ids
    ids.masked_fill_((ids < 0) | (ids > adapters), adapters)
    ordered, places = ids.sort(stable=True)
    order.copy_(places)
    starts = torch.searchsorted(ordered, torch.arange(adapters + 2, device=ids.device))
    offsets.copy_(starts)
    counts = (starts.diff() + TILE_SLOTS - 1) // TILE_SLOTS
    ends = counts.cumsum(0)
    tile = torch.arange(len(tiles), device=ids.device)
    owner = torch.searchsorted(ends, tile, right=True)
    known = owner.clamp(max=adapters)
    tiles[:, 0] = torch.where(owner > adapters, -1, owner)
    tiles[:, 1] = starts[known] + (tile - (ends - counts)[known]) * TILE_SLOTS
