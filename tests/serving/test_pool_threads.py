"""A pool that several threads load into, write to and wait for."""

import random
import threading
from functools import partial

import torch
from test_pool import (
    COLS,
    Cancelled,
    assert_right,
    assert_rows,
    expected,
    factors,
    pool_of,
    rank_of,
)

from lora_kernels import multi_lora_linear
from lora_kernels.serving.pages import PageTable
from lora_kernels.serving.pool import BASE


def in_eight_threads(worker):
    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_update_waits_for_the_users_to_leave():
    pool, entered = pool_of(2), threading.Event()

    def hold():
        with pool.use(["a0"]):
            entered.set()
            threading.Event().wait(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    pool.update("a0", factors(1, rank_of(1)), scaling=2, timeout=10.0)
    thread.join()
    x = torch.randn(1, COLS)
    with pool.use(["a0"]) as slots:
        y = multi_lora_linear(x, None, pool.stack("q"), torch.tensor(slots))
    assert_rows(y, x, partial(expected, "a1"))


def test_eight_threads_load_and_evict_at_once():
    pool, failures = pool_of(40, pages=48, slots=10, max_rank=8), []
    torch.set_num_threads(1)

    def worker(seed):
        make = torch.Generator().manual_seed(seed)
        try:
            for _ in range(60):
                names = [f"a{i}" for i in torch.randint(40, (2,), generator=make).tolist()]
                assert_right(pool, names, timeout=30.0)
        except BaseException as error:
            failures.append(error)

    in_eight_threads(worker)
    assert not failures, failures[:1]
    assert not any(adapter.users for adapter in pool._adapters.values())


def test_eight_threads_with_failing_uploads_and_updates(monkeypatch):
    """Whoever comes, goes, fails, is written over or registered anew: each row is its adapter's."""
    pool, failures, write, draw = pool_of(24, pages=48, slots=10), [], PageTable.write, random.Random(3)
    stopped = []

    def failing(self, slot, lora_a, b_columns, scaling):
        write(self, slot, lora_a, b_columns, scaling)
        if draw.random() < 0.02:
            write(self, slot, lora_a * 0 + 7, b_columns, scaling)
            stopped.append(slot)
            raise Cancelled

    def worker(seed):
        own, name = random.Random(seed), f"a{24 + seed}"
        for step in range(120):
            try:
                act(pool, own, name, step)
            except Cancelled:
                pass
            except BaseException as error:
                failures.append(error)
                return

    monkeypatch.setattr(PageTable, "write", failing)
    torch.set_num_threads(1)
    in_eight_threads(worker)
    assert not failures, failures[:1]
    monkeypatch.undo()
    assert stopped and not any(adapter.users for adapter in pool._adapters.values())
    for table in pool._tables.values():
        owned = [page for pages in table._owned for page in pages]
        assert sorted(owned + table._free) == list(range(48))
    assert len(pool.resident) + len(pool._free_slots) == 10
    for i in range(24):
        assert_right(pool, [f"a{i}"])


def act(pool, own, name, step):
    """One step of a thread: serve two, or write over, forget and register ``name``, or an adapter of all."""
    i = own.randrange(24)
    match step % 4:
        case 0:  # with its own values, so that what a stopped write leaves behind shows
            pool.update(f"a{i}", factors(i, rank_of(i)), scaling=1 + i % 3, timeout=30.0)
        case 1 if name not in pool:
            pool.register(name, factors(int(name[1:]), rank_of(int(name[1:]))), 1 + int(name[1:]) % 3)
            assert_right(pool, [name, f"a{i}"], "k", timeout=30.0)
        case 1:
            pool.remove(name)
        case _:
            assert_right(pool, [f"a{own.randrange(24)}", BASE, f"a{i}"], timeout=30.0)


def test_waiting_for_room_ends_when_someone_leaves():
    pool, entered, leave = pool_of(2, slots=1), threading.Event(), threading.Event()

    def hold():
        with pool.use(["a0"]):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    assert_right(pool, ["a1"], timeout=10.0)
    thread.join()
