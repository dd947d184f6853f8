"""The pool: no wrong row, whoever comes and goes, whatever fails."""

import copy
from functools import partial

import pytest
import torch

from lora_kernels import multi_lora_linear
from lora_kernels.serving.pages import PageTable
from lora_kernels.serving.pool import BASE, AdapterPool, PoolFullError
from lora_kernels.testing import assert_close

COLS, OUT = 12, 10
LINEARS = {"q": (COLS, OUT), "k": (COLS, 6)}


def factors(seed, rank, linears=LINEARS):
    make = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, cols, generator=make), torch.randn(out, rank, generator=make))
        for name, (cols, out) in linears.items()
    }


def rank_of(i):
    return 1 + i % 7


def pool_of(count=0, **options):
    pool = AdapterPool(LINEARS, **{"pages": 64, "slots": 8, "max_rank": 8, **options})
    for i in range(count):
        pool.register(f"a{i}", factors(i, rank_of(i)), scaling=1 + i % 3)
    return pool


def expected(name, x, linear="q"):
    if name == BASE:
        return x.new_zeros(len(x), LINEARS[linear][1])
    i = int(name[1:])
    return delta(x, factors(i, rank_of(i))[linear], 1 + i % 3)


def delta(x, pair, scaling):
    lora_a, lora_b = (factor.to(x.dtype) for factor in pair)
    return scaling * (x @ lora_a.T) @ lora_b.T


def assert_rows(y, x, function):
    """By the error of ``function`` itself in x's dtype, against fp64."""
    assert_close(y, function(x), function(x.double()), ulps=2)


def assert_right(pool, names, linear="q", **options):
    x = torch.randn(len(names), COLS)
    with pool.use(names, **options) as slots:
        y = multi_lora_linear(x, None, pool.stack(linear), torch.tensor(slots))
    for i, name in enumerate(names):
        assert_rows(y[i : i + 1], x[i : i + 1], partial(expected, name, linear=linear))


def test_a_batch_of_several_ranks_and_the_base():
    pool = pool_of(5)
    for linear in LINEARS:
        assert_right(pool, ["a3", BASE, "a0", "a3", "a4"], linear)
    assert pool.resident == ["a3", "a0", "a4"] and len(pool) == 5 and "a1" in pool


def test_two_thousand_adapters_in_sixty_four_slots():
    pool = pool_of(2000, pages=400, slots=64)
    popularity, seen = 1.0 / torch.arange(1, 2001) ** 1.1, set()
    for _ in range(150):
        drawn = torch.multinomial(popularity, 24, replacement=True).tolist()
        assert_right(pool, [f"a{i}" for i in drawn])
        seen.update(drawn)
        assert len(pool.resident) <= 64
    assert len(pool.resident) == 64 and len(seen) > 200


def test_the_least_recently_used_goes_first_and_a_pinned_one_stays():
    pool = pool_of(6, slots=3)
    pool.pin("a0")
    for name in ("a0", "a1", "a2", "a1", "a3"):
        pool.prefetch([name])
    assert pool.resident == ["a0", "a1", "a3"]
    pool.pin("a0", False)
    pool.prefetch(["a4"])
    assert pool.resident == ["a1", "a3", "a4"]


def test_an_adapter_in_use_is_never_evicted():
    pool = pool_of(4, slots=2)
    with (
        pool.use(["a0", "a1"]),
        pytest.raises(PoolFullError, match=r"no room for adapter 'a2'.*short of slots"),
    ):
        pool.prefetch(["a2"])
    assert_right(pool, ["a2", "a3"])


def test_too_few_pages_name_the_linear():
    pool = pool_of(8, pages=8, slots=8)  # a6 has rank 7
    with (
        pool.use(["a6"]),
        pytest.raises(PoolFullError, match=r"short of pages of q \(1 free, 2 needed\)"),
    ):
        pool.prefetch(["a1"])
    with pytest.raises(PoolFullError):
        pool.prefetch(["a6", "a5"])  # of the two no one may make room for the other
    assert_right(pool, ["a5"])


def test_linears_that_an_adapter_leaves_out():
    pool = pool_of(slots=1)
    pool.register("both", factors(1, 3))
    pool.register("q only", {"q": factors(2, 3)["q"]})
    pool.prefetch(["both"])
    with pool.use(["q only"]) as slots:
        x, ids = torch.randn(1, COLS), torch.tensor(slots)
        assert not multi_lora_linear(x, None, pool.stack("k"), ids).any()
        assert multi_lora_linear(x, None, pool.stack("q"), ids).any()


class Cancelled(BaseException):
    pass


def break_write(monkeypatch, fail_at, error):
    """The upload stops before the pages of one of its linears are written, the B of another half way."""
    calls, write = [], PageTable.write

    def failing(self, slot, lora_a, b_columns, scaling):
        calls.append(slot)
        if len(calls) == fail_at:
            write(self, slot, lora_a * 0 + 7, b_columns * 0 - 7, scaling)
            raise error("stopped")
        write(self, slot, lora_a, b_columns, scaling)

    monkeypatch.setattr(PageTable, "write", failing)


def state_of(pool):
    """Everything that a failed call must leave alone, but for what free pages hold."""
    pages = [(copy.deepcopy(table._owned), sorted(table._free)) for table in pool._tables.values()]
    owners = [(name, a.slot, a.users, a.pinned) for name, a in pool._adapters.items()]
    used = [a.slot for a in pool._adapters.values() if a.slot is not None]
    spans = [table.spans[used].tolist() for table in pool._tables.values()]
    return pages, owners, spans, sorted(pool._free_slots)


@pytest.mark.parametrize("names", [["a3", "a4"], ["a0", "a3", "a4", "a6"], ["a6", "a5"]], ids=str)
def test_no_room_changes_nothing(names):
    pool = pool_of(8, pages=12, slots=3)
    pool.prefetch(["a0", "a1", "a2"])
    with pool.use(["a1"]):
        pool.pin("a2")
        before = state_of(pool)
        with pytest.raises(PoolFullError, match="no room for adapter"):
            pool.prefetch(names)
        assert state_of(pool) == before
    for name in ("a0", "a1", "a2"):
        assert_right(pool, [name])


def test_update_writes_into_the_adapters_own_pages():
    """What a CUDA graph has captured: the addresses, the slot and its pages stay."""
    pool = pool_of(3, slots=2)
    pool.pin("a1")
    pool.prefetch(["a0", "a1"])
    x, stack, before = torch.randn(4, COLS), pool.stack("q"), state_of(pool)
    kept = {name: value.clone() for name, value in vars(stack).items() if isinstance(value, torch.Tensor)}
    ids = torch.tensor([pool._adapters["a1"].slot, pool._adapters["a0"].slot, -1, 0])
    fresh = {name: (a + 1, b - 1) for name, (a, b) in factors(9, rank_of(1)).items()}
    pool.update("a1", fresh, scaling=0.5)
    assert state_of(pool) == before and pool.resident == ["a0", "a1"]
    y = multi_lora_linear(x, None, stack, ids)
    assert_rows(y[:1], x[:1], partial(delta, pair=fresh["q"], scaling=0.5))
    assert_rows(y[1:2], x[1:2], partial(expected, "a0"))
    assert torch.equal(stack.pages, kept["pages"]) and torch.equal(stack.spans, kept["spans"])
    pool.pin("a1", False)
    pool.prefetch(["a2"])
    pool.prefetch(["a0"])  # a1 had to go; what comes back is the new one
    assert pool.resident == ["a2", "a0"]
    with pool.use(["a1"]) as slots:
        again = multi_lora_linear(x[:1], None, pool.stack("q"), torch.tensor(slots))
    assert torch.equal(again, y[:1])


def test_refresh_is_one_copy_into_the_adapters_own_pages_that_eviction_keeps():
    pool = pool_of(3, slots=2)
    pool.prefetch(["a0", "a1"])
    pool.remove("a0")  # its pages lie beside those that stay
    pool.register("a0", factors(0, rank_of(0)), scaling=1)
    pool.prefetch(["a1", "a0"])
    before = state_of(pool), {name: table.a_pages.clone() for name, table in pool._tables.items()}
    blob = pool._adapters["a1"].blob.clone()
    x, slot = torch.randn(4, COLS), pool._adapters["a1"].slot
    for step in range(3):
        trained = {
            name: (torch.nn.Parameter(a + step), torch.nn.Parameter(b - step))
            for name, (a, b) in factors(9, rank_of(1)).items()
        }
        pool.refresh("a1", trained, scaling=0.5 + step)
        assert state_of(pool)[0] == before[0][0]
        assert_right(pool, ["a0"])
        with pool.use(["a1"]) as slots:
            y = multi_lora_linear(x, None, pool.stack("q"), torch.tensor(slots * 4))
        assert_rows(y, x, partial(delta, pair=[t.detach() for t in trained["q"]], scaling=0.5 + step))
    assert torch.equal(pool._adapters["a1"].blob, blob)  # the host has not been asked yet
    for name, table in pool._tables.items():
        others = torch.ones(len(table.a_pages), dtype=torch.bool)
        others[table._owned[slot]] = False
        assert torch.equal(table.a_pages[others], before[1][name][others])
    pool.prefetch(["a2", "a0"])
    assert "a1" not in pool.resident
    with pool.use(["a1"]) as slots:
        again = multi_lora_linear(x, None, pool.stack("q"), torch.tensor(slots * 4))
    assert torch.equal(again, y)


def test_refresh_of_what_is_elsewhere_in_use_or_bad(monkeypatch):
    pool, x = pool_of(3), torch.randn(1, COLS)
    pool.refresh("a1", factors(2, rank_of(2)), scaling=3)  # on the host alone, and of another rank
    with pool.use(["a1"]) as slots:
        y = multi_lora_linear(x, None, pool.stack("q"), torch.tensor(slots))
        with pytest.raises(PoolFullError, match="in use"):
            pool.refresh("a1", factors(2, rank_of(2)))
    assert_rows(y, x, partial(expected, "a2"))
    pool.prefetch(["a0"])
    for bad in ({"nope": factors(0, 1)["q"]}, {"q": factors(0, 1)["k"]}):
        with pytest.raises(ValueError, match="factors: "):
            pool.refresh("a0", bad)
    assert_right(pool, ["a0"])
    fresh = factors(0, rank_of(0))
    pool.refresh("a0", {name: (a * 2, b) for name, (a, b) in fresh.items()}, scaling=0.5)
    break_write(monkeypatch, 1, Cancelled)
    with pytest.raises(Cancelled):
        pool.update("a0", factors(7, rank_of(0)))
    monkeypatch.undo()
    assert_right(pool, ["a0"])  # twice A and half the scale
    with pytest.raises(ValueError, match="name: expected a registered adapter, got 'b'"):
        pool.refresh("b", fresh)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_update_that_fails_half_way_leaves_the_old_adapter(monkeypatch, fail_at):
    pool = pool_of(3)
    pool.prefetch(["a0", "a1"])
    break_write(monkeypatch, fail_at, Cancelled)
    with pytest.raises(Cancelled):
        pool.update("a1", factors(50, rank_of(1)))
    monkeypatch.undo()
    assert pool.resident == ["a0"]
    assert_right(pool, ["a0", "a1", "a2"])
    with pytest.raises(ValueError, match="factors: q: expected"):
        pool.update("a1", {"q": factors(1, 2)["k"]})
    assert_right(pool, ["a1"])


def test_other_ranks_and_linears_get_other_pages():
    pool = pool_of(3)
    pool.prefetch(["a1"])
    pool.update("a1", factors(2, rank_of(2)), scaling=1 + 2)
    x = torch.randn(1, COLS)
    with pool.use(["a1"]) as slots:
        y = multi_lora_linear(x, None, pool.stack("q"), torch.tensor(slots))
    assert_rows(y, x, partial(expected, "a2"))
    with pool.use(["a1"]), pytest.raises(PoolFullError, match="in use"):
        pool.update("a1", factors(2, 2))


def test_removed_adapters_free_their_pages():
    pool = pool_of(2, pages=8, max_rank=8)
    pool.prefetch(["a0", "a1"])
    pool.remove("a0")
    pool.remove("a1")
    assert pool._tables["q"].free == 8 and not pool.resident
    with pytest.raises(ValueError, match="expected a registered adapter, got 'a0'"):
        pool.prefetch(["a0"])


@pytest.mark.parametrize("error", [Cancelled, RuntimeError])
@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_upload_that_fails_half_way_loses_nothing(monkeypatch, error, fail_at):
    pool = pool_of(3)
    pool.prefetch(["a0"])
    break_write(monkeypatch, fail_at, error)
    with pytest.raises(error):
        pool.prefetch(["a1"])
    monkeypatch.undo()
    assert pool.resident == ["a0"]
    assert all(table.free == 64 - rank_of(0) for table in pool._tables.values())
    assert len(pool._free_slots) == 7 and not any(a.users for a in pool._adapters.values())
    assert_right(pool, ["a1", "a0", "a2"])


def test_an_upload_of_several_that_fails_brings_none(monkeypatch):
    pool = pool_of(6, slots=4)
    pool.prefetch(["a0", "a1"])
    before = state_of(pool)
    break_write(monkeypatch, 4, Cancelled)  # a2 is there, a3 half
    with pytest.raises(Cancelled):
        pool.prefetch(["a1", "a2", "a3"])
    monkeypatch.undo()
    assert state_of(pool) == before
    assert_right(pool, ["a3", "a2", "a1", "a0"])


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("a0", factors(1, 2), "name: 'a0' is taken"),
        (BASE, factors(1, 2), "is taken"),
        ("", factors(1, 2), "name: expected a name"),
        ("new", {"v": factors(1, 2)["q"]}, "factors: expected linears of q, k, got 'v'"),
        ("new", {"q": factors(1, 2)["k"]}, r"factors: q: expected A \[r, 12\] and B \[10, r\]"),
        ("new", factors(1, 9), "factors: q: expected a rank of 1 to 8, got 9"),
        ("new", {"q": (torch.ones(12), torch.ones(10, 1))}, "q: expected A to be a floating"),
        ("new", {"q": (torch.ones(1, 12), torch.ones(10, 1).int())}, "q: expected B to be a floating"),
    ],
)
def test_bad_adapters_change_nothing(name, given, match):
    pool = pool_of(1)
    with pytest.raises(ValueError, match=match):
        pool.register(name, given)
    assert len(pool) == 1 and not pool.resident


@pytest.mark.parametrize("options", [{"pages": 0}, {"slots": 0}, {"max_rank": 0}, {"max_rank": 65}], ids=str)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pool_of(**options)
