"""The serving benchmark: its cases, its floor, who is refused, and that it runs."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks import bench_multi_lora_linear as bench
from benchmarks.serving_providers import (
    PATTERNS,
    PROVIDERS,
    ServingCase,
    exact,
    floor_bytes,
    make_problem,
    row_adapters,
    used,
)
from benchmarks.suites import Goal, Provider, Runner
from lora_kernels.cli import main as cli

BY_NAME = {provider.name: provider for provider in PROVIDERS}
CASES = (
    ServingCase(5, 3, "uniform", rank=4, cols=32, outs=(24,)),
    ServingCase(4, 4, "distinct", rank=0, cols=48, outs=(32, 8, 8)),
    ServingCase(3, 1, "identical", rank=8, cols=32, outs=(16,), dtype=torch.bfloat16),
)
HERE = [name for name in BY_NAME if BY_NAME[name].missing(CASES[0], "delta") is None]


def test_patterns():
    counts = {
        pattern: torch.tensor(row_adapters(ServingCase(256, 64, pattern))).bincount(minlength=64)
        for pattern in PATTERNS
    }
    assert used(ServingCase(256, 64, "identical")) == [0]
    assert (counts["distinct"] == 4).all()
    assert counts["uniform"].max() < 16
    assert counts["zipf"][0] > counts["zipf"][1] > counts["zipf"][5:].max()
    assert counts["skewed"][0] > 100
    assert counts["skewed"][1:].max() < 16
    assert all(total.sum() == 256 for total in counts.values())


def test_the_grid_covers_the_patterns_ranks_and_widths():
    cases = {plan.case for plan in bench.cuda_plans(False)}
    assert {case.pattern for case in cases} == set(PATTERNS)
    assert {case.rows for case in cases} == {1, 8, 32, 64, 128, 256}
    assert {case.rank for case in cases} == {8, 16, 64, 0}
    assert {case.outs for case in cases} == {(4096,), (14336,), (4096, 1024, 1024)}
    assert {case.adapters for case in cases if case.rows == 128} == {1, 32, 128}
    labels = {plan.case.label for plan in bench.cpu_plans(False)}
    assert {goal.case for goal in bench.GOALS} <= labels


def test_floor_counts_the_adapters_in_use():
    case = ServingCase(32, 32, "distinct")
    assert floor_bytes(case) == 4 * (32 * 16 * 8192 + 32 * 4096 * 3)
    assert floor_bytes(ServingCase(32, 32, "identical")) == 4 * (16 * 8192 + 32 * 4096 * 3)
    mixed = ServingCase(4, 4, "distinct", 0, outs=(4096, 1024))
    assert floor_bytes(mixed) == 4 * ((8 + 16 + 32 + 64) * (2 * 4096 + 5120) + 4 * (4096 + 2 * 5120))


def test_bandwidth_and_floor(monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 16)
    bench.bandwidth.cache_clear()
    assert 1e6 < bench.bandwidth("cpu") < 1e13
    bench.bandwidth.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("name", HERE)
def test_everyone_adds_the_same_delta(name, case):
    assert bench.check(BY_NAME[name], case) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_stacks_hold_the_adapters(case):
    problem = make_problem(case)
    stacks_a, stacks_b = problem.padded()
    packed_a, packed_b = problem.packed()
    for i, rank in enumerate(case.ranks):
        column = 0
        for s, out in enumerate(case.outs):
            a, b = problem.factors[s][i]
            assert torch.equal(stacks_a[s][i, 0, :rank], a)
            assert torch.equal(stacks_b[s][i, 0, :, :rank], b)
            assert torch.equal(packed_a[i, s * rank : (s + 1) * rank], a)
            assert torch.equal(packed_b[i, column : column + out, :rank], b)
            column += out


def wrong(problem):
    y = problem.y.clone()
    want = exact(problem).to(problem.case.dtype)

    def call(x):
        y.copy_(want)
        y[-1] += 1e-3 * y.abs().max()
        return y

    return Runner(call)


def test_a_wrong_row_is_refused():
    assert "y is off" in bench.check(Provider("suspect", wrong), CASES[0])


def test_quick_run_with_goals(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 16)
    plan = bench.cpu_plans(True)[0]
    goal = Goal("/ loop", plan.case.label, "delta", "loop", 1e9, "ours_reference")
    monkeypatch.setattr(bench, "GOALS", (goal,))
    options = ["--suite", "serving", "--device", "cpu", "--quick", "--repeats", "2"]
    assert command.main([*options, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("floor µs", "/ floor", "vllm_torch", "Not measured", "ours_in_sglang"):
        assert word in printed
    with (tmp_path / "cpu-serving.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"multi_lora_linear"}
    assert all(float(row["median_us"]) > 0 and float(row["floor µs"]) > 0 for row in rows)
    assert {row["pattern"] for row in rows} == {"zipf", "distinct"}


def test_the_command_line_passes_the_options_on(capsys, monkeypatch):
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 16)
    options = ["--suite", "serving", "--quick", "--device", "cpu", "--repeats", "1", "--filter", "/loop$"]
    with pytest.raises(SystemExit) as end:
        cli(["bench", *options])
    assert end.value.code == 0
    assert "`loop`" in capsys.readouterr().out
