"""More adapters than fit on the device: which are there, which make room, and how they come."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.multi_lora_linear import AdapterStack
from .pages import PageTable

BASE = "__base__"
Factors = tuple[Tensor, Tensor]


class PoolFullError(RuntimeError):
    """The adapters in use leave no room for those asked for; the message says what is short."""


@dataclass
class _Adapter:
    """An adapter on the host: every A and Bᵀ in one blob, and where each linear's part lies in it."""

    blob: Tensor
    parts: dict[str, tuple[int, int]]  # linear -> (first element, rank)
    scalings: dict[str, float]
    slot: int | None = None
    users: int = 0
    pinned: bool = False
    ready: torch.cuda.Event | None = field(default=None, repr=False)


class AdapterPool:
    """Adapters of any rank, all of them on the host, the most recently used ones on the device.

    A page is one rank row of A with its column of B, so no adapter is padded to another's rank. An adapter
    is one blob on the host (pinned where there is a GPU) and comes over in one copy on a side stream; what
    computes waits for its event and not for the host. An adapter in use is never evicted. Thread-safe.

    Args:
        linears: name of each linear -> (in_features, out_features).
        pages: rank rows that fit on the device, for each linear.
        slots: how many adapters may be on the device at once.
        max_rank: the widest rank that an adapter may have; a constant of the kernels' launches.
        device: where the pages live.
        dtype: of the pages.

    Raises:
        ValueError: a size below 1, or ``max_rank`` above ``pages``.
    """

    def __init__(
        self,
        linears: Mapping[str, tuple[int, int]],
        pages: int = 1024,
        slots: int = 64,
        max_rank: int = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("pages", pages), ("slots", slots), ("max_rank", max_rank)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if max_rank > pages:
            raise ValueError(f"max_rank: expected at most pages ({pages}), got {max_rank}")
        self.device, self.dtype, self.max_rank = torch.device(device), dtype, max_rank
        self.linears = dict(linears)
        self._tables = {
            name: PageTable(*sizes, pages, slots, max_rank, self.device, dtype)
            for name, sizes in self.linears.items()
        }
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()  # the least recently used first
        self._free_slots = list(range(slots))
        self._lock = threading.Condition()
        self._last_uses: dict[int, torch.cuda.Event] = {}
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is registered."""
        return name in self._adapters

    def __len__(self) -> int:
        """How many adapters are registered."""
        return len(self._adapters)

    @property
    def resident(self) -> list[str]:
        """The adapters on the device, the least recently used first."""
        with self._lock:
            return [name for name, adapter in self._adapters.items() if adapter.slot is not None]

    def register(
        self, name: str, factors: Mapping[str, Factors], scaling: float | Mapping[str, float] = 1.0
    ) -> None:
        """Takes an adapter in, on the host; it comes to the device when it is used.

        Args:
            name: a new name.
            factors: linear -> (A ``[r, in]``, B ``[out, r]``); linears it leaves out keep their base.
            scaling: s, for all or for each linear.

        Raises:
            ValueError: the name is taken, a linear is unknown, or a shape does not fit. Nothing changes then.
        """
        adapter = self._packed(name, factors, scaling)
        with self._lock:
            if name in self._adapters or name == BASE:
                raise ValueError(f"name: {name!r} is taken")
            self._adapters[name] = adapter

    def update(
        self, name: str, factors: Mapping[str, Factors], scaling: float | Mapping[str, float] = 1.0
    ) -> None:
        """Puts other tensors in the place of an adapter, of any rank; used next, it is the new one.

        Raises:
            ValueError: as :meth:`register`; or the adapter is not known.
            PoolFullError: it is in use.
        """
        fresh = self._packed(name, factors, scaling)
        with self._lock:
            old = self._known(name)
            self._must_be_idle(name, old)
            self._evict(old)
            fresh.pinned = old.pinned
            self._adapters[name] = fresh

    def remove(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: it is not known.
            PoolFullError: it is in use.
        """
        with self._lock:
            adapter = self._known(name)
            self._must_be_idle(name, adapter)
            self._evict(adapter)
            del self._adapters[name]
            self._lock.notify_all()

    def pin(self, name: str, flag: bool = True) -> None:
        """Keeps an adapter from being evicted, or no longer."""
        with self._lock:
            self._known(name).pinned = bool(flag)
            self._lock.notify_all()

    def prefetch(self, names: Iterable[str]) -> None:
        """Brings adapters over ahead of their use."""
        with self.use(list(names)):
            pass

    @contextlib.contextmanager
    def use(self, names: Sequence[str], *, timeout: float = 0.0) -> Iterator[list[int]]:
        """Holds adapters on the device inside the ``with`` block; gives each name's slot, -1 for the base.

        Args:
            names: one a row or a sample, repeated as they come; ``"__base__"`` for none.
            timeout: seconds to wait for other users to leave where there is no room.

        Raises:
            ValueError: an unknown name.
            PoolFullError: the adapters in use leave no room.
        """
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        with self._lock:
            held = self._acquire(wanted, timeout)
        try:
            self._wait_for(held)
            yield [-1 if name == BASE else self._adapters[name].slot for name in names]  # type: ignore[misc]
        finally:
            with self._lock:
                self._release(held)
                self._note_use()
                self._lock.notify_all()

    def stack(self, linear: str) -> AdapterStack:
        """What :func:`multi_lora_linear` needs of one linear; ids are the slots of :meth:`use`."""
        return self._tables[linear].stack()

    def _known(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise ValueError(f"name: expected a registered adapter, got {name!r}")
        return self._adapters[name]

    def _must_be_idle(self, name: str, adapter: _Adapter) -> None:
        if adapter.users:
            raise PoolFullError(f"adapter {name!r} is in use")

    def _packed(
        self, name: str, factors: Mapping[str, Factors], scaling: float | Mapping[str, float]
    ) -> _Adapter:
        """The adapter as one blob, once everything was checked."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a name, got {name!r}")
        parts, flat, first = {}, [], 0
        for linear, (lora_a, lora_b) in factors.items():
            self._check(linear, lora_a, lora_b)
            parts[linear] = (first, lora_a.shape[0])
            flat += [lora_a.detach().reshape(-1), lora_b.detach().T.reshape(-1)]
            first += lora_a.numel() + lora_b.numel()
        blob = (
            torch.cat([t.to("cpu", self.dtype) for t in flat]) if flat else torch.empty(0, dtype=self.dtype)
        )
        if self._side is not None:
            blob = blob.pin_memory()
        each = {linear: scaling[linear] if isinstance(scaling, Mapping) else scaling for linear in factors}
        return _Adapter(blob, parts, each)

    def _check(self, linear: str, lora_a: Tensor, lora_b: Tensor) -> None:
        if linear not in self.linears:
            raise ValueError(f"factors: expected linears of {', '.join(self.linears)}, got {linear!r}")
        cols, out = self.linears[linear]
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, cols) or lora_b.shape != (out, rank):
            got = f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            raise ValueError(f"factors: {linear}: expected A [r, {cols}] and B [{out}, r], got {got}")
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"factors: {linear}: expected a rank of 1 to {self.max_rank}, got {rank}")

    def _acquire(self, wanted: list[str], timeout: float) -> list[_Adapter]:
        """Counts all the adapters as used once all are resident; while it waits it holds none of them."""
        held = [self._known(name) for name in wanted]
        for name in wanted:
            self._adapters.move_to_end(name)
        shortage: list[str] = []
        if not self._lock.wait_for(lambda: self._hold(wanted, held, shortage), timeout):
            raise PoolFullError(shortage[-1])
        return held

    def _hold(self, names: list[str], adapters: list[_Adapter], shortage: list[str]) -> bool:
        for adapter in adapters:  # counted before room is made, not to be evicted for one another
            adapter.users += 1
        try:
            for name, adapter in zip(names, adapters, strict=True):
                if not self._room(adapter):
                    shortage.append(self._shortage(name, adapter))
                    self._release(adapters)
                    return False
                if adapter.slot is None:
                    self._upload(adapter)
        except BaseException:
            self._release(adapters)
            raise
        return True

    def _release(self, adapters: list[_Adapter]) -> None:
        for adapter in adapters:
            adapter.users -= 1

    def _fits(self, adapter: _Adapter) -> bool:
        enough = all(self._tables[linear].free >= rank for linear, (_, rank) in adapter.parts.items())
        return enough and bool(self._free_slots)

    def _room(self, adapter: _Adapter) -> bool:
        """Evicts idle adapters, the least recently used first, until ``adapter`` fits; whether it does."""
        if adapter.slot is not None:
            return True
        idle = [a for a in self._adapters.values() if a.slot is not None and not a.users and not a.pinned]
        for victim in idle:
            if self._fits(adapter):
                break
            self._evict(victim)
        return self._fits(adapter)

    def _shortage(self, name: str, adapter: _Adapter) -> str:
        busy = sum(a.slot is not None for a in self._adapters.values())
        lacking = [
            f"pages of {linear} ({self._tables[linear].free} free, {rank} needed)"
            for linear, (_, rank) in adapter.parts.items()
            if self._tables[linear].free < rank
        ]
        short = lacking[0] if lacking else "slots"
        return f"no room for adapter {name!r}: {busy} adapters are in use or pinned, short of {short}"

    def _evict(self, adapter: _Adapter) -> None:
        if adapter.slot is None:
            return
        for linear in adapter.parts:
            self._tables[linear].give_back(adapter.slot)
        self._free_slots.append(adapter.slot)
        adapter.slot, adapter.ready = None, None

    def _upload(self, adapter: _Adapter) -> None:
        """Copies the blob over and then says where it is; after an error the pages are free again."""
        slot = self._free_slots.pop()
        adapter.slot = slot
        for linear, (_, rank) in adapter.parts.items():
            self._tables[linear].take(slot, rank)
        try:
            with self._on_side_stream():
                self._copy(adapter, slot)
                if self._side is not None:
                    adapter.ready = torch.cuda.Event()
                    adapter.ready.record(self._side)
        except BaseException:
            self._evict(adapter)
            raise

    def _copy(self, adapter: _Adapter, slot: int) -> None:
        blob = adapter.blob.to(self.device, non_blocking=True)
        for table in self._tables.values():
            table.clear(slot)
        for linear, (first, rank) in adapter.parts.items():
            cols, out = self.linears[linear]
            middle, last = first + rank * cols, first + rank * (cols + out)
            lora_a, b_columns = blob[first:middle].view(rank, cols), blob[middle:last].view(rank, out)
            self._tables[linear].write(slot, lora_a, b_columns, adapter.scalings[linear])

    def _on_side_stream(self) -> contextlib.AbstractContextManager:
        if self._side is None:
            return contextlib.nullcontext()
        # What was launched before, on any stream, may still read the pages that are to be overwritten.
        for event in self._last_uses.values():
            self._side.wait_event(event)
        return torch.cuda.stream(self._side)

    def _note_use(self) -> None:
        if self._side is not None:
            stream = torch.cuda.current_stream(self.device)
            self._last_uses[stream.cuda_stream] = stream.record_event()

    def _wait_for(self, held: list[_Adapter]) -> None:
        for adapter in held:
            if adapter.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(adapter.ready)
