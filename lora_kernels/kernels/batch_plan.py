"""The plan of a batch in one program: a sort, a histogram and two running sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _backend
from .._ops import TILE_SLOTS

# What one program holds; a larger batch is planned by PyTorch's own kernels.
MAX_SLOTS, MAX_ADAPTERS = 512, 1023
_TILE = tl.constexpr(TILE_SLOTS)


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
    """Slots sorted by adapter, stably: the sort's key is (adapter, slot)."""
    slot = tl.arange(0, SLOTS)
    adapter = tl.load(given_ptr + slot, mask=slot < given, other=-1).to(tl.int32)
    adapter = tl.where((adapter >= 0) & (adapter < adapters), adapter, adapters)
    tl.store(ids_ptr + slot, adapter.to(tl.int64), mask=slot < slots)
    # Slots beyond the batch come last, as if they were of one adapter more.
    adapter = tl.where(slot < slots, adapter, adapters + 1)
    key = tl.sort(adapter * SLOTS + slot)
    owner = key // SLOTS
    tl.store(order_ptr + slot, key % SLOTS, mask=slot < slots)

    bins = tl.arange(0, ADAPTERS)
    counts = tl.histogram(adapter, ADAPTERS)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(offsets_ptr + bins, starts, mask=bins <= adapters + 1)

    begins = ((slot - tl.gather(starts, owner, 0)) % _TILE == 0) & (slot < slots)
    place = tl.cumsum(begins.to(tl.int32), 0) - 1
    tl.store(tiles_ptr + 2 * place, owner, mask=begins)
    tl.store(tiles_ptr + 2 * place + 1, slot, mask=begins)
    made = tl.sum(begins.to(tl.int32), 0)
    idle = made + tl.arange(0, SLOTS)
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
        num_warps=4,
    )
