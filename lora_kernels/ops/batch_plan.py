"""Which rows of a batch are whose: computed once a step, on the device, for every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import TILE_SLOTS
from . import _dispatch


class BatchPlan(NamedTuple):
    """Which slots are whose; a slot is a row, or one of the k adapters of a row.

    ``order`` has the slots sorted by adapter, those without one last as if they were adapter D's; adapter i
    has ``order[offsets[i]:offsets[i + 1]]``. ``tiles`` cuts that into programs: (adapter, first place), with
    adapter -1 for a program that has nothing to do. ``ids`` are int64, the others int32.

    Examples:
        >>> plan = plan_batch(torch.tensor([1, 0, 1, -1]), adapters=2)
        >>> plan.order
        tensor([1, 0, 2, 3], dtype=torch.int32)
    """

    ids: Tensor
    order: Tensor
    offsets: Tensor
    tiles: Tensor

    @classmethod
    def allocate(cls, slots: int, adapters: int, device: torch.device | str | None = None) -> BatchPlan:
        """Buffers for a batch of ``slots``, which :func:`plan_batch` fills: what a CUDA graph captures.

        Args:
            slots: rows of the batch, times the adapters of a row where there are several.
            adapters: how many adapters there are.
            device: where.
        """
        tiles = slots // TILE_SLOTS + min(adapters + 1, slots)

        def small(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        ids = torch.empty(slots, dtype=torch.long, device=device)
        return cls(ids, small(slots), small(adapters + 2), small(tiles, 2))


def plan_batch(adapter_ids: Tensor, adapters: int, *, out: BatchPlan | None = None) -> BatchPlan:
    """The plan of one batch, for every layer of a step.

    Computed on the device of ``adapter_ids``, with no host sync, in one launch for up to 512 slots.

    Args:
        adapter_ids: integers of any shape; what is not in [0, adapters) means no adapter.
        adapters: how many adapters there are.
        out: buffers of :meth:`BatchPlan.allocate` to write into; if they have more slots than there are ids,
            the others get no adapter.

    Returns:
        ``out``, or a new plan.

    Raises:
        TypeError: ``adapter_ids`` are no integers.
        ValueError: ``out`` has fewer slots than there are ids, or is for another number of adapters.

    Examples:
        >>> plan = plan_batch(torch.tensor([1, 0, 1, -1]), adapters=2)
        >>> plan.offsets
        tensor([0, 1, 3, 4], dtype=torch.int32)
    """
    if not isinstance(adapter_ids, Tensor) or adapter_ids.is_floating_point():
        got = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
        raise TypeError(f"adapter_ids: expected a Tensor of integers, got {got}")
    flat = adapter_ids.reshape(-1)
    if out is None:
        out = BatchPlan.allocate(flat.numel(), adapters, flat.device)
    if out.ids.numel() < flat.numel() or out.offsets.numel() != adapters + 2:
        have = f"{out.ids.numel()} slots and {out.offsets.numel() - 2} adapters"
        raise ValueError(f"out: expected {flat.numel()} slots and {adapters} adapters, got {have}")
    _dispatch.call("batch_plan", flat, adapters, *out)
    return out
