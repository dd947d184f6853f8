"""The suite ``methods`` and the miniatures: all structures are measured, and who is wrong is found out."""

from __future__ import annotations

import csv
import types

import pytest

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks import bench_methods, miniatures
from benchmarks.bench_methods import BENCHMARK, OURS, Case
from benchmarks.miniatures import __main__ as miniatures_command
from benchmarks.suites import Provider, Runner
from lora_kernels import methods


def test_every_structure_is_in_the_suite():
    assert {plan.case.method for plan in BENCHMARK.plans["methods"]("cpu", True)} == {*methods.structures()}


def test_a_wrong_result_is_found_out(monkeypatch):
    case = Case("lora", 8, 64, 4)
    right = bench_methods._ours
    assert bench_methods.check(Provider(OURS, right), case) is None

    def wrong(problem, method=None):
        runner = right(problem, method)
        return Runner(lambda x: runner.call(x) * 1.001, runner.factors, runner.context)

    monkeypatch.setattr(bench_methods, "_ours", wrong)
    assert "is off by" in bench_methods.check(Provider(OURS, wrong), case)


def test_command_measures_the_suite(tmp_path):
    arguments = [
        "--suite",
        "methods",
        "--quick",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--filter",
        "^methods/do",
    ]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "cpu-methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"dora"}
    assert {"lora", OURS, "dense", "peft"} <= {row["provider"] for row in rows}


def test_each_miniature_is_of_the_register():
    assert {*miniatures.keys(), *miniatures.WITHIN} <= {one.key for one in methods.REGISTER}
    assert {*miniatures.WITHIN.values()} <= {*miniatures.keys()}


def test_methods_without_a_miniature_are_listed():
    under = miniatures_command.report.conditions("cpu", "so", 1)
    missing = {one.key for one in methods.REGISTER} - {*miniatures.keys(), *miniatures.WITHIN}
    lines = miniatures_command.page([], under).splitlines()
    named = " ".join(line for line in lines if line.startswith("Without a miniature"))
    assert all(f"`{key}`" in named for key in missing)


@pytest.mark.exhaustive
@pytest.mark.parametrize("key", miniatures.keys())
def test_each_miniature_runs(key):
    assert miniatures.outcome(key, seeds=(0,)).error is None


def test_a_miniature_that_fails_or_does_not_hold_is_listed_so(monkeypatch):
    def outcome(run):
        module = types.SimpleNamespace(CLAIM="so", run=run, holds=lambda figures: figures[0]["a"] > 1)
        monkeypatch.setattr(miniatures.importlib, "import_module", lambda *_: module)
        return miniatures.outcome("k", seeds=(0, 1))

    good, bad, broken = outcome(lambda s: {"a": 2}), outcome(lambda s: {"a": s}), outcome(lambda s: 1 / 0)
    lines = list(miniatures.table([good, bad, broken]))[2:]
    assert "a: 2, 2 | yes" in lines[0] and "a: 0, 1 | **no**" in lines[1] and "ZeroDivisionError" in lines[2]


def test_unknown_miniatures_are_named(capsys):
    assert miniatures_command.main(["--only", "nope"]) == 2
    assert "--only: expected some of" in capsys.readouterr().err
