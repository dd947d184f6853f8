"""Which adapters leave the device so that others fit: the least recently used that nobody holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from .host import SLOT, HostAdapter


def idle(adapters: Iterable[HostAdapter], wanted: Collection[HostAdapter]) -> list[HostAdapter]:
    """Those of ``adapters`` that may make room for ``wanted``, in their order."""
    keep = {id(adapter) for adapter in wanted}
    return [
        adapter
        for adapter in adapters
        if adapter.slot is not None and not (adapter.users or adapter.pinned or id(adapter) in keep)
    ]


def victims(
    absent: Collection[HostAdapter], candidates: Iterable[HostAdapter], free: Counter[str | None]
) -> list[HostAdapter] | None:
    """The first candidates that have to go for ``absent`` to fit, or ``None`` where that is not enough."""
    needed = sum((adapter.size for adapter in absent), Counter[str | None]())
    going, left = [], iter(candidates)
    while any(free[what] < count for what, count in needed.items()):
        victim = next(left, None)
        if victim is None:
            return None
        going.append(victim)
        free += victim.size
    return going


def shortage(
    wanted: Mapping[str, HostAdapter], adapters: Collection[HostAdapter], free: Counter[str | None]
) -> str:
    """Which of ``wanted`` does not fit even where all idle ones go, and for want of what."""
    free = sum((adapter.size for adapter in idle(adapters, wanted.values())), free)
    busy = sum(bool(a.users or a.pinned) for a in adapters if a.slot is not None)
    for name, adapter in wanted.items():
        size = adapter.size if adapter.slot is None else Counter[str | None]()
        for what in sorted(size, key=lambda what: what is SLOT):
            if free[what] < size[what]:
                pages = f"pages of {what} ({free[what]} free, {size[what]} needed)"
                short = "slots" if what is SLOT else pages
                busy_ones = f"{busy} adapters are in use or pinned"
                return f"no room for adapter {name!r}: {busy_ones}, short of {short}"
        free.subtract(size)
    return f"no room for adapters {', '.join(wanted)} in time"
