"""The suite ``peft``: every tuner of PEFT is a row, and who is wrong is found out."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from benchmarks import __main__ as command
from benchmarks import bench_peft_tuners as bench
from benchmarks.measure import saved_bytes
from benchmarks.suites import Provider, Runner
from lora_kernels.testing.peft_tuners import CASES, WITHOUT_A_STEP

SMALL = bench.Case("vera", 2, 4, 32, 48, 4, 2, 4)


def test_every_tuner_of_peft_is_a_row():
    rows = {plan.case.tuner for plan in bench.plans("cpu", True)}
    assert rows == {*CASES, *WITHOUT_A_STEP}
    configs = {kind.__name__ for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    named = {case.config for case in CASES.values()}
    assert named <= configs
    rest = {
        key.value.lower() for key, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.__name__ not in named
    }
    assert rest <= {*WITHOUT_A_STEP}


def test_a_wrong_result_is_found_out(monkeypatch):
    right = bench._in_peft
    ours = Provider(bench.OURS, bench._ours)
    assert bench.check(ours, SMALL) is None

    def wrong(problem, model):
        runner = right(problem, model)
        off = any(type(module).__name__ == "FusedVera" for module in model.modules())
        return Runner(lambda x: runner.call(x) * (1.001 if off else 1), runner.factors)

    monkeypatch.setattr(bench, "_in_peft", wrong)
    assert "y is off by" in bench.check(ours, SMALL)


def test_a_step_moves_what_is_trained_and_only_that():
    problem = bench.make_problem(SMALL)
    runner = bench._ours(problem)
    before, frozen = [p.detach().clone() for p in runner.factors], [p.clone() for p in problem.weight]
    _, step = bench._step(runner, problem)
    step(None)
    assert all(not torch.equal(p, q) for p, q in zip(runner.factors, before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(problem.weight, frozen, strict=True))


def test_saved_bytes_of_a_sparse_tensor():
    problem = bench.make_problem(SMALL)
    sparse = torch.eye(SMALL.hidden).to_sparse()
    kept = saved_bytes(Runner(lambda x: torch.sparse.mm(sparse, x[0].T)), problem)
    assert kept >= SMALL.hidden * (2 * 8 + 4)


def test_command_measures_the_suite(tmp_path):
    arguments = ["--suite", "peft", "--quick", "--device", "cpu", "--repeats", "1"]
    chosen = ["--filter", "^peft/(vera|cpt)/", "--output", str(tmp_path)]
    assert command.main([*arguments, *chosen]) == 0
    with (tmp_path / "cpu-peft.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["tuner"] for row in rows} == {"vera"}
    assert {row["provider"] for row in rows} == {"peft", "ours", "lora"}
    assert {row["mode"] for row in rows} == {"step", "saved_bytes", "peak_memory"}
    assert "tokens in front of the input" in (tmp_path / "cpu-peft.md").read_text()
