"""The suite ``compose``: together is as apart, and a pool that was not refreshed is found out."""

from __future__ import annotations

import pytest

from benchmarks.bench_compose import BENCHMARK, NAMES, OURS, REFRESH, Case, check
from benchmarks.suites import Provider, Runner


@pytest.mark.parametrize("kind", [*NAMES, REFRESH])
def test_every_provider_is_right(kind):
    case = Case(kind, 2, 64)
    able = [one for one in BENCHMARK.providers if one.missing(case, "pass") is None]
    assert OURS in {one.name for one in able} and len(able) > 1
    assert all(check(one, case) is None for one in able)


def test_what_is_wrong_is_found_out():
    idle = Provider("idle", lambda problem: Runner(lambda at: None))
    assert check(idle, Case(REFRESH, 1, 64))
    base = Provider("base", lambda problem: Runner(lambda at: [at.x, at.x]))
    assert check(base, Case("policy", 2, 64))
