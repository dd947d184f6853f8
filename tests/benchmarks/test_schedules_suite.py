"""The suite ``schedules``: every optimiser and schedule is in it; a step that does nothing is found out."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("transformers")

from benchmarks import __main__ as command
from benchmarks.bench_schedules import BENCHMARK, WITH, Case, check
from benchmarks.step_recipes import RECIPES, WITHOUT_STEP
from benchmarks.suites import Provider, Runner
from lora_kernels import methods, schedules


def test_every_step_of_the_register_is_in_the_suite():
    steps = {one.key for one in methods.REGISTER if one.kind == "step"}
    exported = [getattr(schedules, name) for name in schedules.__all__]
    keys = {one.key for one in exported if isinstance(one, type) and hasattr(one, "key")}
    assert {one.key for one in RECIPES} == (steps | keys) - {*WITHOUT_STEP}


def test_a_step_that_does_nothing_is_found_out():
    right = BENCHMARK.providers[1].build

    def build(problem):
        right(problem)
        return Runner(lambda _: None)

    case = Case("riemannian_lora/quiet")
    assert check(Provider(WITH, right), case) is None
    assert check(Provider("wrong", build), case) == "weights moved by 0.0"


def test_command_measures_the_suite(tmp_path):
    arguments = ["--suite", "schedules", "--quick", "--device", "cpu", "--repeats", "1"]
    assert command.main([*arguments, "--filter", "galore", "--output", str(tmp_path)]) == 0
    with (tmp_path / "cpu-schedules.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["phase"], row["provider"]) for row in rows} == {
        (phase, name) for phase in ("quiet", "acting") for name in ("without", "ours")
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("provider", BENCHMARK.providers, ids=lambda one: one.name)
@pytest.mark.parametrize("label", [f"{one.key}/{one.phase}" for one in RECIPES])
def test_every_step_moves_weights(label, provider):
    assert check(provider, Case(label)) is None
