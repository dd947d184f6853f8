"""The suite ``optimizers``: every provider steps, and one that does not is found out."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks.bench_optimizers import BENCHMARK, OURS, Case, check
from benchmarks.suites import Provider, Runner


@pytest.mark.parametrize("provider", BENCHMARK.providers, ids=lambda one: one.name)
def test_every_provider_steps(provider):
    assert check(provider, Case(2, 16, 2)) is None


def test_a_step_that_does_nothing_is_found_out():
    right = BENCHMARK.providers[0].build

    def build(problem):
        return Runner(lambda _: None, right(problem).factors)

    assert "parameters moved by" in check(Provider("wrong", build), Case(2, 16, 2))


def test_command_measures_the_suite(tmp_path):
    arguments = ["--suite", "optimizers", "--quick", "--device", "cpu", "--repeats", "2"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "cpu-optimizers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {*OURS, "peft_lora_fa"} <= {row["provider"] for row in rows}
