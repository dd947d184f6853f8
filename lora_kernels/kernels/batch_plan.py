"""The plan of a batch in one program, which sorts by counting."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _backend
from .._ops import TILE_SLOTS

# What one program holds; a larger batch is planned by PyTorch's own kernels.
MAX_SLOTS, MAX_ADAPTERS = 512, 1023
_TILE = tl.constexpr(TILE_SLOTS)


@triton.jit
def _adapter_of(given_ptr, slot, given, slots, adapters):
    """Whose a slot is: nobody's counts as adapter ``adapters``', and one beyond the batch as the next."""
    adapter = tl.load(given_ptr + slot, mask=slot < given, other=-1).to(tl.int32)
    adapter = tl.where((adapter >= 0) & (adapter < adapters), adapter, adapters)
    return tl.where(slot < slots, adapter, adapters + 1)


@triton.jit(do_not_specialize=["given", "slots", "adapters", "tiles"])
def batch_plan_kernel(
    given_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    given,
    slots,
    adapters,
    tiles,
    SLOTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
):
    """A counting sort: a slot comes after the lesser adapters' and after its own adapter's earlier ones."""
    slot = tl.arange(0, SLOTS)
    inside = slot < slots
    adapter = _adapter_of(given_ptr, slot, given, slots, adapters)
    tl.store(ids_ptr + slot, adapter.to(tl.int64), mask=inside)

    bins = tl.arange(0, ADAPTERS)
    counts = tl.histogram(adapter, ADAPTERS)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(offsets_ptr + bins, starts, mask=bins <= adapters + 1)
    tiles_each = tl.where(bins <= adapters, (counts + _TILE - 1) // _TILE, 0)
    tile_starts = tl.cumsum(tiles_each, 0) - tiles_each

    earlier = tl.zeros((SLOTS,), tl.int32)
    for first in range(0, slots, 16):
        other = first + tl.arange(0, 16)
        same = _adapter_of(given_ptr, other, given, slots, adapters)[None, :] == adapter[:, None]
        earlier += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
    place = tl.gather(starts, adapter, 0) + earlier
    tl.store(order_ptr + place, slot, mask=inside)

    begins = inside & (earlier % _TILE == 0)
    tile = tl.gather(tile_starts, adapter, 0) + earlier // _TILE
    tl.store(tiles_ptr + 2 * tile, adapter, mask=begins)
    tl.store(tiles_ptr + 2 * tile + 1, place, mask=begins)
    idle = tl.sum(tiles_each, 0) + slot
    tl.store(tiles_ptr + 2 * idle, -1, mask=idle < tiles)
    tl.store(tiles_ptr + 2 * idle + 1, 0, mask=idle < tiles)


def sizes(slots: int, adapters: int) -> dict[str, int]:
    """The constants of the kernel: powers of two that hold the batch."""
    return {
        "SLOTS": max(16, triton.next_power_of_2(slots)),
        "ADAPTERS": max(16, triton.next_power_of_2(adapters + 2)),
    }


def batch_plan(
    adapter_ids: Tensor, adapters: int, ids: Tensor, order: Tensor, offsets: Tensor, tiles: Tensor
) -> None:
    """The op of ``_ops.py``."""
    slots = ids.shape[0]
    if slots > MAX_SLOTS or adapters + 2 > MAX_ADAPTERS or slots == 0:
        _backend.implementation("reference", "batch_plan")(adapter_ids, adapters, ids, order, offsets, tiles)
        return
    batch_plan_kernel[(1,)](
        *(adapter_ids, ids, order, offsets, tiles, adapter_ids.shape[0], slots, adapters, tiles.shape[0]),
        **sizes(slots, adapters),
        num_warps=8,
    )
