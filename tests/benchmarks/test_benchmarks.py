from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.bench_lora_linear import BENCHMARK
from benchmarks.checks import check
from benchmarks.measure import Bench, Results, saved_bytes
from benchmarks.providers import FROZEN, PEFT, PROVIDERS, SCALING, Case, make_problem
from benchmarks.suites import (
    DEFAULT,
    Derived,
    Goal,
    Plan,
    Provider,
    Row,
    Runner,
    benchmarks,
    file_stem,
    suites,
)
from lora_kernels import _cpu_version, _extension
from lora_kernels.testing.timers import Summary

BY_NAME = {provider.name: provider for provider in PROVIDERS}
SMALL = Case(16, 32, 24, rank=4)
DROPPED = replace(SMALL, dropout_p=0.25)
HALF = replace(SMALL, dtype=torch.bfloat16)
# Compiling takes longer than all the other tests here; one test of its own does it.
EAGER = [name for name in BY_NAME if name != "peft_compiled"]
UNDER = report.Conditions("cpu", "t", "t", "p", "c", "python -m benchmarks", "2000-01-01", 1, 2)


def composite(scaling=SCALING, drop=lambda x, p: F.dropout(x, p, p > 0)):
    """The equation with a scaling and a dropout that may be wrong."""

    def build(problem):
        a, b = problem.factors()
        p = problem.case.dropout_p
        return Runner(lambda x: x @ problem.weight.T + drop(x, p) @ a.T @ b.T * scaling, (a, b))

    return Provider("suspect", build)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


@pytest.mark.parametrize("case", [SMALL, DROPPED, HALF], ids=lambda case: case.label)
@pytest.mark.parametrize("name", EAGER)
def test_every_provider_that_is_here_is_right(name, case):
    provider = BY_NAME[name]
    if why := provider.missing(case, "both"):
        pytest.skip(why)
    assert check(provider, case) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [SMALL, DROPPED], ids=lambda case: case.label)
def test_compiled_peft_is_right(case):
    assert check(BY_NAME["peft_compiled"], case) is None


@pytest.mark.parametrize(
    ("provider", "case", "why"),
    [
        (composite(scaling=SCALING * 1.01), SMALL, "y is off"),
        (composite(drop=lambda x, p: _WrongGradient.apply(x)), SMALL, "dx is off"),
        (composite(drop=lambda x, p: x / 0), SMALL, "y is not finite"),
        (composite(drop=lambda x, p: F.dropout(x, p / 2, p > 0)), DROPPED, "dropout keeps"),
        (composite(drop=lambda x, p: F.dropout(x, p, p > 0) * (1 - p)), DROPPED, "y is off"),
    ],
    ids=["scaling", "gradient", "nan", "keep rate", "no rescaling"],
)
def test_a_wrong_provider_is_found_out(provider, case, why):
    assert why in check(provider, case)


def test_a_mask_that_differs_in_backward_is_found_out():
    class Redrawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.p = p
            return F.dropout(x, p, p > 0)

        @staticmethod
        def backward(ctx, dy):
            return F.dropout(dy, ctx.p, ctx.p > 0), None

    assert "dx is off" in check(composite(drop=Redrawn.apply), DROPPED)


def test_wrong_and_failing_providers_are_not_reported():
    def fails(problem):
        raise RuntimeError("no such kernel\nand more")

    wrong = composite(scaling=1.0)
    providers = (BY_NAME[FROZEN], BY_NAME[PEFT], wrong, Provider("failing", fails))
    bench = Bench(2)
    bench.run(replace(BENCHMARK, providers=providers), Plan(SMALL, "both"))
    assert {row.provider for _, row in bench.results.rows} == {FROZEN, PEFT}
    assert ("failing", "RuntimeError: no such kernel") in bench.results.wrong
    assert "y is off" in "".join(why for _, why in bench.results.wrong)
    text = report.markdown(bench.results, UNDER)
    assert "Refused" in text and "no such kernel" in text


def test_a_missing_provider_is_listed_with_its_reason():
    absent = Provider("absent", None, lambda case, mode: "not here")
    bench = Bench(1)
    bench.run(replace(BENCHMARK, providers=(absent,)), Plan(SMALL, "forward"))
    assert "- `absent`: not here" in report.markdown(bench.results, UNDER)


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_each_mode_times_every_provider_in_every_round(mode):
    bench = Bench(3, lambda label: label.endswith("/ours_cpp"))
    bench.run(BENCHMARK, Plan(SMALL, mode))
    rows = {row.provider: row for _, row in bench.results.rows}
    assert {FROZEN, PEFT} <= set(rows) <= {FROZEN, PEFT, "ours_cpp"}
    assert rows[FROZEN].ratios[FROZEN] == 1.0 and rows[PEFT].ratios[PEFT] == 1.0
    assert all(0 < row.time.p20 <= row.time.median <= row.time.p80 for row in rows.values())


def saved(name, case):
    problem = make_problem(case)
    return saved_bytes(BY_NAME[name].build(problem), problem)


def test_saved_bytes_of_known_layers():
    m, k, r = SMALL.rows, SMALL.cols, SMALL.rank
    assert saved(FROZEN, HALF) == 0  # its weight is a parameter
    assert saved(PEFT, HALF) == 2 * (m * k + m * r)  # x for dA, h for dB
    assert saved("recomputing_function", HALF) == 2 * m * k


def test_saved_bytes_of_dropout():
    case = replace(HALF, dropout_p=0.1)
    m, k, r = case.rows, case.cols, case.rank
    assert saved("peft_byte_mask", case) == 2 * m * k + m * k + 2 * m * r
    assert saved("ours_reference", case) == 2 * m * k + m * k // 8 + 2 * m * r


def test_saved_bytes_counts_a_storage_once():
    def build(problem):
        return Runner(lambda x: (x[:8] * problem.dy[:8, :1]) + (x[8:] * problem.dy[8:, 1:2]))

    problem = make_problem(SMALL)
    assert saved_bytes(build(problem), problem) == problem.dy.untyped_storage().nbytes()


def test_plans_hold_the_shapes_of_the_goals():
    for one in benchmarks():
        plans = [
            plan for make in one.plans.values() for device in ("cpu", "cuda") for plan in make(device, False)
        ]
        cells = {(plan.case.label, plan.mode) for plan in plans}
        assert {(goal.case, goal.mode) for goal in one.goals} <= cells


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_no_plan_stands_twice(device, quick):
    for one in benchmarks():
        for make in one.plans.values():
            cells = [(plan.case, plan.mode) for plan in make(device, quick)]
            assert len(set(cells)) == len(cells)


def test_every_benchmark_keeps_the_contract():
    known = benchmarks()
    assert suites(known)[0] == DEFAULT
    for one in known:
        names = [provider.name for provider in one.providers]
        assert len(set(names)) == len(names) and set(one.baselines) <= set(names)
        for suite in one.plans:
            for plan in (plan for device in ("cpu", "cuda") for plan in one.plans[suite](device, True)):
                assert one.mode(plan.mode).name == plan.mode
                assert plan.providers is None or plan.providers <= set(names)
                assert plan.case.label in one.label(plan) and plan.case.title and plan.case.columns
        for goal in one.goals:
            assert one.mode(goal.mode) and {goal.provider, goal.base} <= set(names)


def test_result_files_are_named_after_suite_and_device():
    assert file_stem(DEFAULT, "cpu") == "cpu"
    assert file_stem("training", "cuda") == "cuda-training"
    assert command._stem("training", "cuda", "mine") == "cuda-training-mine"


def test_a_label_is_a_part_of_a_files_name(tmp_path, capsys):
    assert command.main(["--label", "../up", "--output", str(tmp_path)]) == 2
    assert "--label: expected letters and digits, got '../up'" in capsys.readouterr().err


def test_goals_are_judged_on_their_own_row():
    goal = BENCHMARK.goals[0]
    plan = Plan(Case(512, 2048, 2048), "both")
    time = Summary(1.0, 1.0, 1.0)
    rows = [
        Row("ours_module", plan, time, None, {FROZEN: 1.04, PEFT: 0.9}),
        Row(PEFT, plan, time, None, {FROZEN: 1.2, PEFT: 1.0}),
    ]
    assert report.reached(goal, rows) == 1.04
    assert report.reached(goal, rows[1:]) is None
    other = [replace(rows[0], plan=Plan(Case(64, 64, 64), "both"))]
    assert report.reached(goal, other) is None


def test_a_goal_of_bytes_may_be_measured_against_any_provider():
    plan = Plan(SMALL, "saved_bytes")
    rows = [Row("ours", plan, bytes=30), Row("rival", plan, bytes=40)]
    goal = Goal("bytes", SMALL.label, "saved_bytes", "rival", 0.8, "ours")
    assert report.reached(goal, rows) == 0.75
    assert report.reached(goal, rows[:1]) is None


def test_derived_columns_and_other_baselines_are_reported(tmp_path):
    rate = Derived("rows/s", lambda row: SMALL.rows / row.time.median * 1e6 if row.time else None, 0)
    eager = [BY_NAME[name] for name in ("eager", FROZEN)]
    shown = replace(BENCHMARK, providers=tuple(eager), baselines={"eager": "eager"}, derived=(rate,))
    bench = Bench(2)
    bench.run(shown, Plan(SMALL, "both"))
    text = report.markdown(bench.results, UNDER)
    assert "| provider | both | / eager | rows/s |" in text and "/ PEFT" not in text
    report.write_csv(tmp_path / "x.csv", bench.results, UNDER)
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["ratio_eager"] == "1.0000" and float(rows[0]["rows/s"]) > 0
    assert "ratio_peft" not in rows[0]


def test_many_cases_have_an_overview():
    results = Results()
    for rows in range(1, report.MANY + 1):
        plan, time = Plan(replace(SMALL, rows=rows), "both"), Summary(8.0, 7.0, 9.0)
        results.add(BENCHMARK, Row(FROZEN, plan, time, ratios={FROZEN: 1.0}))
        if rows > 1:
            results.add(BENCHMARK, Row("ours_cpp", plan, time, ratios={FROZEN: 1.25}))
    lines = report.markdown(results, UNDER).splitlines()
    place = lines.index("**`lora_linear`, both / frozen**")
    assert lines[place + 2] == "| case | `frozen` | `ours_cpp` |"
    assert lines[place + 4] == "| 1x32x24/float32/r4/p0 | 8 µs (7 to 9) | - |"
    assert lines[place + 5] == "| 2x32x24/float32/r4/p0 | 8 µs (7 to 9) | 1.25 |"
    results.rows = results.rows[:2]
    assert "both / frozen**" not in report.markdown(results, UNDER)


def test_a_plan_may_name_its_providers():
    bench = Bench(1)
    bench.run(BENCHMARK, Plan(SMALL, "forward", providers=frozenset({"eager"})))
    assert {row.provider for _, row in bench.results.rows} == {FROZEN, PEFT, "eager"}


def test_what_the_budget_leaves_out_is_listed():
    bench = Bench(1)
    todo = [(BENCHMARK, Plan(SMALL, mode)) for mode in ("forward", "both")]
    command.execute(bench, todo, budget=1e-9)
    assert bench.results.rows == []
    assert bench.results.left_out == [BENCHMARK.label(plan) for _, plan in todo]
    assert "Left out, because the time was over (2): `lora_linear/16x32x24" in report.markdown(
        bench.results, UNDER
    )


def test_command_writes_csv_table_and_plot(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    assert command.main([*arguments, "--filter", "x64/.*/(overhead|both)/ours_cpp"]) == 0
    with (tmp_path / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("op", "provider", "mode", "shape", "dtype", "rank", "dropout"),
        *("median_us", "p20_us", "p80_us", "bytes", "ratio_frozen", "ratio_peft"),
        *("device", "torch", "triton", "peft", "commit", "command", "timestamp"),
    ]
    assert {row["provider"] for row in rows} >= {FROZEN, PEFT}
    assert {row["mode"] for row in rows} == {"both", "overhead"}
    assert all(float(row["median_us"]) > 0 and float(row["ratio_peft"]) > 0 for row in rows)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "cpu.md").read_text()
    assert "**1x64x64, float32, r=16, dropout 0**" in table
    assert table == capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "["], "--filter: expected a regular expression"),
        (["--filter", "no such benchmark"], "--filter: expected a match"),
        (["--suite", "no such suite"], "--suite: expected one of default"),
        (["--budget-seconds", "0"], "--budget-seconds: expected more than 0"),
        (["--repeats", "0"], "--repeats: expected at least 1"),
        (["--threads", "-1"], "--threads: expected at least 1"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, message, capsys):
    assert command.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_bar_where_nobody_watches():
    stream = io.StringIO()
    with report.progress(3, stream) as advance:
        advance("text", 1)
    assert stream.getvalue() == ""


def unbound(*python, **given):
    """What a fresh Python prints, in an environment that says of threads only what is given."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | given
    done = subprocess.run([sys.executable, *python], env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core, which no thread has for itself")
@pytest.mark.parametrize("given", [{}, {"OMP_PROC_BIND": "false"}])
def test_the_command_binds_its_threads_unless_the_environment_says_otherwise(given):
    options = ("--device", "cpu", "--quick", "--repeats", "1", "--filter", "x64/.*/forward/eager")
    table = unbound("-m", "benchmarks", *options, **given)
    assert ("threads bound to cores;" in table) == (not given) and "threads" in table


@pytest.mark.parametrize("late", ["", "import torch; os.environ['OMP_PROC_BIND'] = 'true'; "])
def test_a_program_that_imports_it_keeps_its_threads(late):
    told = unbound(
        "-c",
        f"import os; {late}before = dict(os.environ); from benchmarks import report\n"
        "print(dict(os.environ) == before, report.device_name('cpu'))",
    )
    assert told.startswith("True ") and told.endswith("threads\n")


@pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
def test_conditions_name_the_instructions_in_use_and_what_they_are_held_from():
    *_, least = _cpu_version.runnable()
    code = (
        "from benchmarks import report, __main__ as m; print(report.device_name('cpu'), m._stem('x', 'cpu'))"
    )
    env = {**os.environ, "LORA_KERNELS_CPU_VERSION": least}
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    if least != report.widest():
        assert f"{report.widest()} limited to {least}, torch" in told and told.split()[-1] == f"cpu-x-{least}"
    else:
        assert "limited" not in told and told.split()[-1] == "cpu-x"
