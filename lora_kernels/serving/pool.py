"""More adapters than fit on the device: which are there, and how they come."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..ops.adapter_stack import AdapterStack
from . import room
from .host import SLOT, Factors, HostAdapter, HostLayout, for_each
from .pages import PageTable

BASE = "__base__"


class PoolFullError(RuntimeError):
    """The adapters in use leave no room for those asked for; the message says what is short."""


class AdapterPool:
    """Adapters of any rank, all of them on the host, the most recently used ones on the device.

    A page is one rank row of A with its column of B, so no adapter is padded to another's rank. An adapter
    is one blob on the host (pinned where there is a GPU) and comes over in one copy on a side stream; what
    computes waits for its event and not for the host. An adapter in use is never evicted. Thread-safe.

    Args:
        linears: name of each linear -> (in_features, out_features), or of an embedding -> (num_embeddings,
            embedding_dim), whose A is ``[r, num_embeddings]`` and B ``[embedding_dim, r]``.
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
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()  # the least recently used first
        self._free_slots = list(range(slots))
        self._lock = threading.Condition()
        self._last_uses: dict[int, torch.cuda.Event] = {}
        self._host = HostLayout(self.linears, max_rank, dtype, self.device.type == "cuda")
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
        adapter = self._host.pack(name, factors, scaling)
        with self._lock:
            if name in self._adapters or name == BASE:
                raise ValueError(f"name: {name!r} is taken")
            self._adapters[name] = adapter

    def update(
        self,
        name: str,
        factors: Mapping[str, Factors],
        scaling: float | Mapping[str, float] = 1.0,
        *,
        timeout: float = 0.0,
    ) -> None:
        """Puts other tensors in the place of an adapter; used next, it is the new one.

        An adapter on the device that keeps its ranks is written over where it is, on the side stream: slot,
        pages and addresses stay, so a captured CUDA graph computes with the new values. With other ranks, or
        other linears, it leaves its pages and gets new ones when it is used.

        Args:
            name: an adapter that is registered.
            factors: as :meth:`register`.
            scaling: as :meth:`register`.
            timeout: seconds to wait for its users to leave.

        Raises:
            ValueError: as :meth:`register`; or the adapter is not known.
            PoolFullError: it is in use.

        After an error the adapter is the old one.
        """
        fresh = self._host.pack(name, factors, scaling)
        with self._lock:
            self._lock.wait_for(lambda: not self._known(name).users, timeout)
            old = self._known(name)
            self._must_be_idle(name, old)
            self._keep(old)  # should the write fail
            if old.slot is not None and old.parts == fresh.parts:
                self._write(old, fresh.blob, fresh.scalings)
                fresh.slot, fresh.ready, old.slot = old.slot, old.ready, None
            self._evict(old)
            fresh.pinned = old.pinned
            self._adapters[name] = fresh
            self._lock.notify_all()

    def refresh(
        self,
        name: str,
        factors: Mapping[str, Factors],
        scaling: float | Mapping[str, float] = 1.0,
        *,
        timeout: float = 0.0,
    ) -> None:
        """:meth:`update` after every training step: one copy, from where the tensors are to the pages.

        ``pool.refresh(name, *lower_adapter(model, "policy"))``: whoever uses the adapter next, a sampler with
        this pool, computes with the new values; no other adapter's pages are touched. Of an adapter on the
        device that keeps its ranks the host's copy is made only when it has to leave; any other one is
        updated. On a GPU the copy waits for what the caller's stream has launched.

        Args:
            name: an adapter that is registered.
            factors: as :meth:`register`.
            scaling: as :meth:`register`.
            timeout: seconds to wait for its users to leave.

        Raises:
            ValueError: as :meth:`register`; or the adapter is not known. It is then as it was.
            PoolFullError: it is in use.
        """
        parts = self._host.parts(factors)
        each = for_each(factors, scaling)
        with self._lock:
            self._lock.wait_for(lambda: not self._known(name).users, timeout)
            adapter = self._known(name)
            self._must_be_idle(name, adapter)
            if adapter.slot is not None and adapter.parts == parts:
                self._overwrite(adapter, factors, each)
                self._lock.notify_all()
                return
        self.update(name, factors, each, timeout=timeout)

    def remove(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: it is not known.
            PoolFullError: it is in use.
        """
        with self._lock:
            adapter = self._known(name)
            self._must_be_idle(name, adapter)
            adapter.stale = False
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
            PoolFullError: the adapters in use leave no room; the pool is then as it was.

        After any other error of an upload none of these adapters came to the device, and those that made
        room for them come back when they are used.
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

    def _known(self, name: str) -> HostAdapter:
        if name not in self._adapters:
            raise ValueError(f"name: expected a registered adapter, got {name!r}")
        return self._adapters[name]

    def _must_be_idle(self, name: str, adapter: HostAdapter) -> None:
        if adapter.users:
            raise PoolFullError(f"adapter {name!r} is in use")

    def _acquire(self, wanted: list[str], timeout: float) -> list[HostAdapter]:
        """Counts all the adapters as used once all are resident; while it waits it holds none of them."""
        if not self._lock.wait_for(lambda: self._hold([self._known(name) for name in wanted]), timeout):
            named = {name: self._known(name) for name in wanted}
            raise PoolFullError(room.shortage(named, self._adapters.values(), self._free()))
        for name in wanted:
            self._adapters.move_to_end(name)
        return [self._adapters[name] for name in wanted]

    def _hold(self, adapters: list[HostAdapter]) -> bool:
        """Whether all fit at once: then they are on the device and counted as used, else nothing changes."""
        absent = [adapter for adapter in adapters if adapter.slot is None]
        victims = self._victims(absent, adapters) if absent else []
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim)
        try:
            for adapter in absent:
                self._upload(adapter)
        except BaseException:
            for adapter in absent:
                self._evict(adapter)
            raise
        for adapter in adapters:
            adapter.users += 1
        return True

    def _release(self, adapters: list[HostAdapter]) -> None:
        for adapter in adapters:
            adapter.users -= 1

    def _victims(self, absent: list[HostAdapter], wanted: list[HostAdapter]) -> list[HostAdapter] | None:
        return room.victims(absent, room.idle(self._adapters.values(), wanted), self._free())

    def _free(self) -> Counter[str | None]:
        return Counter({SLOT: len(self._free_slots), **{n: table.free for n, table in self._tables.items()}})

    def _evict(self, adapter: HostAdapter) -> None:
        if adapter.slot is None:
            return
        self._keep(adapter)
        for linear in adapter.parts:
            self._tables[linear].give_back(adapter.slot)
        self._free_slots.append(adapter.slot)
        adapter.slot, adapter.ready = None, None

    def _keep(self, adapter: HostAdapter) -> None:
        """Copies to the host what only the pages have."""
        if adapter.slot is None or not adapter.stale:
            return
        if adapter.ready is not None:
            adapter.ready.synchronize()
        for linear, (first, rank) in adapter.parts.items():
            lora_a, b_columns = self._host.views(adapter.blob, linear, first, rank)
            self._tables[linear].read(adapter.slot, lora_a, b_columns)
        adapter.stale = False

    @torch.no_grad()
    def _overwrite(
        self, adapter: HostAdapter, factors: Mapping[str, Factors], scalings: dict[str, float]
    ) -> None:
        """Copies tensors straight into the adapter's own pages; after an error it leaves them."""
        assert adapter.slot is not None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with self._on_side_stream():
                for linear, (lora_a, lora_b) in factors.items():
                    other = scalings[linear] if scalings[linear] != adapter.scalings[linear] else None
                    self._tables[linear].overwrite(adapter.slot, lora_a.detach(), lora_b.detach(), other)
                if self._side is not None:
                    adapter.ready = torch.cuda.Event()
                    adapter.ready.record(self._side)
        except BaseException:
            adapter.stale = False
            self._evict(adapter)
            raise
        adapter.scalings, adapter.stale = scalings, True

    def _upload(self, adapter: HostAdapter) -> None:
        """Gives the adapter a slot and pages and fills them; after an error they are free again."""
        adapter.slot = self._free_slots.pop()
        for linear, (_, rank) in adapter.parts.items():
            self._tables[linear].take(adapter.slot, rank)
        self._write(adapter, adapter.blob, adapter.scalings)

    def _write(self, adapter: HostAdapter, blob: Tensor, scalings: dict[str, float]) -> None:
        """Copies a blob into the adapter's own pages; after an error, half written, it leaves them."""
        assert adapter.slot is not None
        try:
            with self._on_side_stream():
                self._copy(adapter.slot, blob, adapter.parts, scalings)
                if self._side is not None:
                    adapter.ready = torch.cuda.Event()
                    adapter.ready.record(self._side)
        except BaseException:
            adapter.stale = False
            self._evict(adapter)
            raise

    def _copy(
        self, slot: int, blob: Tensor, parts: dict[str, tuple[int, int]], scalings: dict[str, float]
    ) -> None:
        blob = blob.to(self.device, non_blocking=True)
        for name, table in self._tables.items():
            if name not in parts:
                table.clear(slot)
        for linear, (first, rank) in parts.items():
            lora_a, b_columns = self._host.views(blob, linear, first, rank)
            self._tables[linear].write(slot, lora_a, b_columns, scalings[linear])

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

    def _wait_for(self, held: list[HostAdapter]) -> None:
        for adapter in held:
            if adapter.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(adapter.ready)
