"""The suite ``quantized_linear``: its providers are right, and a wrong one is found out."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("peft")

from benchmarks import __main__ as command
from benchmarks.bench_quantized_linear import BENCHMARK, FORMATS, Case, check
from benchmarks.suites import Provider, Runner


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("provider", BENCHMARK.providers, ids=lambda one: one.name)
def test_every_provider_that_is_here_is_right(provider, format):
    case = Case(3, 128, 64, format)
    if why := provider.missing(case, "forward"):
        pytest.skip(why)
    assert check(provider, case) is None


def test_the_unquantised_weight_is_found_out():
    wrong = Provider("wrong", lambda problem: Runner(lambda x: x @ problem.original.T))
    assert "y is off" in check(wrong, Case(3, 128, 64, "int8"))


def test_command_measures_the_suite(tmp_path):
    arguments = ["--suite", "quantized_linear", "--quick", "--device", "cpu", "--repeats", "2"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "cpu-quantized_linear.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["format"] for row in rows} == set(FORMATS)
    assert {"dense", "eager"} <= {row["provider"] for row in rows}
    assert all(float(row["median_us"]) > 0 and float(row["ratio_eager"]) > 0 for row in rows)
