"""The planner: a pure function that never picks what was measured slower; its tables; its speed."""

import dataclasses
import json
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import planner
from lora_kernels.planner import Entry, Plan, Problem, Table, choose, parse, plan, to_text

LARGE = Problem("lora_linear", 8192, 4096, 4096, 16, "bf16", "sm_90")
CARDS = ("sm_80", "sm_90")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of tables of this test's own; the process's plans are forgotten before and after."""
    monkeypatch.setenv("LORA_KERNELS_PLANS", str(tmp_path / "plans"))
    forget()
    yield tmp_path / "plans"
    monkeypatch.undo()
    forget()


def forget():
    planner.tables.cache_clear()
    planner._planned.cache_clear()
    planner._looked = float("-inf")


def measured(*entries, card="sm_90"):
    return Table(card, "measured", tuple(entries))


def write(folder, table):
    folder.mkdir(exist_ok=True)
    (folder / f"{table.card}.json").write_text(to_text(table, "a test"))
    # A file system's clock is coarse, and two writes may share a tick of it.
    ticks = write.ticks = getattr(write, "ticks", 0) + 1
    os.utime(folder / f"{table.card}.json", (ticks, ticks))


sizes = st.integers(1, 20000)
problems = st.builds(
    Problem,
    op=st.sampled_from(("lora_linear", "lora_linear_backward")),
    rows=sizes,
    cols=sizes,
    out=sizes,
    rank=st.integers(1, 512),
    dtype=st.sampled_from(("bf16", "fp16", "fp32")),
    card=st.just("sm_90"),
    dropout=st.booleans(),
)
plans = st.builds(
    Plan,
    st.sampled_from(planner.STRATEGIES[1:]),
    st.sampled_from(({}, {"gemm": {"block_c": 128}}, {"dy": {"num_stages": 3}, "x": {"block_m": 64}})),
)
entries = st.builds(
    Entry, problems, st.lists(st.tuples(plans, st.floats(0.5, 1e5)), min_size=1, max_size=6).map(tuple)
)
tables = st.lists(entries, min_size=1, max_size=8, unique_by=lambda e: e.problem).map(lambda e: measured(*e))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(table=tables)
def test_never_slower_than_the_best_measured(table):
    for entry in table.entries:
        picked = choose(entry.problem, (table,))
        times = [us for tried, us in entry.times if tried == picked]
        assert min(times) == min(us for _, us in entry.times)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(table=tables, problem=problems)
def test_in_between_the_nearest_decides(table, problem):
    known = [e for e in table.entries if planner._distance(problem, e.problem) < float("inf")]
    picked = choose(problem, (table,))
    if not known:
        assert picked == choose(problem)
        return
    nearest = min(planner._distance(problem, e.problem) for e in known)
    assert any(picked == e.best() for e in known if planner._distance(problem, e.problem) == nearest)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(table=tables)
def test_a_table_survives_its_file(table):
    assert parse(json.loads(to_text(table, "a test")), "sm_90").entries == tuple(
        Entry(e.problem, tuple((tried, round(us, 2)) for tried, us in e.times)) for e in table.entries
    )


def test_a_measured_table_comes_before_the_one_that_ships():
    user = measured(Entry(LARGE, ((Plan("beta"), 400.0), (Plan("kext"), 399.0))))
    shipped = Table("sm_90", "predicted", (Entry(LARGE, ((Plan("beta"), 1.0), (Plan("kext"), 2.0))),))
    assert choose(LARGE, (user, shipped)).strategy == "kext"
    assert choose(LARGE, (shipped,)).strategy == "beta"


def test_a_prediction_must_be_clear():
    close = Entry(LARGE, ((Plan("beta"), 100.0), (Plan("kext"), 95.0)))
    clear = Entry(LARGE, ((Plan("beta"), 100.0), (Plan("kext"), 80.0)))
    assert choose(LARGE, (Table("sm_90", "predicted", (close,)),)).strategy == "beta"
    assert choose(LARGE, (Table("sm_90", "predicted", (clear,)),)).strategy == "kext"


def test_far_shapes_and_other_cards_say_nothing():
    table = measured(Entry(LARGE, ((Plan("kext"), 1.0),)))
    assert choose(dataclasses.replace(LARGE, rows=2048), (table,)).strategy == "kext"
    for change in ({"rows": 2047}, {"rank": 65}, {"dtype": "fp32"}, {"base": False}, {"card": "sm_80"}):
        assert choose(dataclasses.replace(LARGE, **change), (table,)).strategy == "beta"


@pytest.mark.parametrize("card", ("sm_75", "sm_121", "gfx1100", "xpu"))
def test_an_unknown_card_works_at_once(card):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(dataclasses.replace(LARGE, card=card)) == Plan("beta")
        assert plan(dataclasses.replace(LARGE, card=card, rows=1)) == Plan("single")
        few = {"card": card, "rows": 1}
        assert plan(dataclasses.replace(LARGE, **few, op="lora_linear_backward")) == Plan("beta")
        assert plan(dataclasses.replace(LARGE, **few, base=False)) == Plan("beta")


@pytest.mark.parametrize("card", CARDS)
def test_what_ships_is_what_the_byte_counts_predict(card):
    pytest.importorskip("triton")
    from lora_kernels import tuning

    data = json.loads((planner.SHIPPED / f"{card}.json").read_text())
    assert data["kind"] == "predicted" and "nothing measured" in data["made"]
    table = parse(data, card)
    assert tuning.predict([entry.problem for entry in table.entries], card) == table, "run `make plans`"
    assert choose(dataclasses.replace(LARGE, card=card), (table,)).strategy == "beta"
    assert choose(dataclasses.replace(LARGE, card=card, rows=1), (table,)).strategy == "single"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected an object, got list"),
        ("\x00", "Expecting value"),
        ("{}", "format: expected"),
        ({"format": "lora-kernels plans 2"}, "format: expected"),
        ({"card": "sm_80"}, "card: expected 'sm_90', got 'sm_80'"),
        ({"kind": "guessed"}, "kind: expected"),
        ({"entries": None}, "not iterable"),
        ({"entries": [{}]}, "'problem' is missing"),
        ({"entries": [{"problem": {"rows": 1}, "tried": []}]}, "required"),
        ({"tried": []}, "tried: expected"),
        ({"tried": [{"strategy": "beta", "us": -1}]}, "tried: expected"),
        ({"tried": [{"strategy": "beta", "us": "soon"}]}, "could not convert"),
        ({"tried": [{"strategy": "magic", "us": 1}]}, "strategy: expected"),
        ({"tried": [{"strategy": "kext", "us": 1, "tile": {"gemm": {"block_m": 48}}}]}, "tile: gemm.block_m"),
        ({"tried": [{"strategy": "kext", "us": 1, "tile": {"gemm": {"block_m": 8}}}]}, "tile: gemm.block_m"),
        ({"tried": [{"strategy": "kext", "us": 1, "tile": {"gemm": {"block_r": 16}}}]}, "tile: gemm.block_r"),
        ({"tried": [{"strategy": "beta", "us": 1, "tile": {"dy": {"block_k": 16}}}]}, "tile: dy.block_k"),
        ({"tried": [{"strategy": "beta", "us": 1, "tile": {"os": {"block_k": 16}}}]}, "tile: os.block_k"),
        ({"tried": [{"strategy": "beta", "us": 1, "tile": 3}]}, "items"),
    ],
    ids=str,
)
def test_a_bad_file_is_one_warning_and_safe_defaults(folder, text, reason):
    data = json.loads(to_text(measured(Entry(LARGE, ((Plan("kext"), 1.0),))), "a test"))
    if isinstance(text, dict):
        tried = text.pop("tried", None)
        data |= text
        if tried is not None:
            data["entries"][0]["tried"] = tried
        text = json.dumps(data)
    folder.mkdir()
    (folder / "sm_90.json").write_text(text)
    with pytest.warns(UserWarning, match="not a table of plans for sm_90") as caught:
        assert plan(LARGE) == Plan("beta")
        assert plan(dataclasses.replace(LARGE, rows=4096)) == Plan("beta")
    assert len(caught) == 1
    assert reason in str(caught[0].message) and str(folder / "sm_90.json") in str(caught[0].message)


def test_a_running_process_picks_a_new_table_up(folder, monkeypatch):
    assert plan(LARGE).strategy == "beta"
    write(folder, measured(Entry(LARGE, ((Plan("kext", {"gemm": {"block_c": 128}}), 1.0),))))
    assert plan(LARGE).strategy == "beta"  # not looked for at every call
    monkeypatch.setattr(planner, "_LOOK_EVERY_S", -1.0)
    assert plan(LARGE) == Plan("kext", {"gemm": {"block_c": 128}})
    write(folder, measured(Entry(LARGE, ((Plan("beta", {"dy": {"block_m": 16}}), 1.0),))))
    assert plan(LARGE) == Plan("beta", {"dy": {"block_m": 16}})
    (folder / "sm_90.json").unlink()
    assert plan(LARGE) == Plan("beta")


def test_a_shape_that_was_seen_reads_no_table(monkeypatch):
    first = plan(LARGE)
    monkeypatch.setattr(planner, "choose", None)
    assert plan(LARGE) is first


def test_use_strategy_goes_before_any_table():
    with planner.use_strategy("kext"):
        assert plan(LARGE) == Plan("kext")
    with pytest.raises(ValueError, match="strategy: expected one of auto, beta, kext, single, got 'fast'"):
        planner.use_strategy("fast").__enter__()


def test_changes_are_fields_of_the_tiles():
    from lora_kernels.kernels.config import GemmTile, Tile

    fields = {cls: {f.name for f in dataclasses.fields(cls)} for cls in (Tile, GemmTile)}
    for part, names in planner.PASSES.items():
        assert set(names) <= fields[GemmTile if part in ("gemm", "single") else Tile]


CHANGES = {
    "beta": {"forward": {"block_c": 16}, "dy": {"block_c": 16, "block_m": 16}, "x": {"block_m": 16}},
    "kext": {"gemm": {"block_m": 64, "block_c": 16, "block_k": 16, "group_m": 1}},
    "single": {"single": {"block_m": 16, "block_c": 64, "block_k": 16}},
}


@pytest.mark.parametrize("strategy", CHANGES)
def test_a_plan_reaches_the_kernels(strategy, folder, device, monkeypatch):
    pytest.importorskip("triton")
    from lora_kernels import lora_linear, use_backend
    from lora_kernels.kernels import kext, passes, single

    sizes = {"rows": 24, "cols": 40, "out": 32, "rank": 4, "dtype": "fp32", "card": planner.card(device)}
    ops = ("lora_linear", "lora_linear_backward")
    tried = ((Plan(strategy, CHANGES[strategy]), 1.0), (Plan("beta"), 2.0))
    write(folder, measured(*(Entry(Problem(op, **sizes), tried) for op in ops), card=sizes["card"]))
    seen = {}

    def spy(name, module):
        inner = module.blocks

        def record(tile):
            seen.setdefault(name, []).append(tile)
            return inner(tile)

        monkeypatch.setattr(module, "blocks", record)

    for name, module in {"beta": passes, "kext": kext, "single": single}.items():
        spy(name, module)
    x, w = torch.randn(24, 40, device=device, requires_grad=True), torch.randn(32, 40, device=device)
    a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 40), (32, 4)))
    with use_backend("triton"):
        y = lora_linear(x, w, a, b)
        y.sum().backward()
    torch.testing.assert_close(y, x @ w.T + x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
    wanted = [set(changes.items()) for changes in CHANGES[strategy].values()]
    launched = [set(dataclasses.asdict(tile).items()) for tile in seen[strategy]]
    assert all(any(want <= tile for tile in launched) for want in wanted)


def test_planning_imports_no_triton(after_torch):
    code = (
        "import sys; from lora_kernels.planner import Problem, plan;"
        "plan(Problem('lora_linear', 8, 8, 8, 4, 'bf16', 'sm_90')); assert 'triton' not in sys.modules"
    )
    done = after_torch(code)
    assert done.returncode == 0, done.stderr
