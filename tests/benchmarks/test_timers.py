from __future__ import annotations

import random

import pytest
import torch

from lora_kernels.testing.timers import CudaTimer, HostTimer, interleave, paired_ratio, percentile, summarize


def test_summary_of_known_samples():
    summary = summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.median, summary.p20, summary.p80) == (3.5, 2.0, 5.0)


def test_percentile_interpolates():
    assert percentile([0.0, 10.0], 0.25) == 2.5
    assert percentile([7.0], 0.8) == 7.0


def test_summary_needs_samples():
    with pytest.raises(ValueError, match="samples: expected at least one"):
        summarize([])


def test_paired_ratio_divides_drift_out():
    drift = [1.0, 3.0, 9.0, 27.0]
    assert paired_ratio([2 * d for d in drift], drift) == 2.0


def test_paired_ratio_wants_equal_rounds():
    with pytest.raises(ValueError, match="expected 2 rounds"):
        paired_ratio([1.0, 2.0], [1.0])


def test_interleave_takes_each_once_a_round_in_changing_order():
    calls: list[str] = []
    rounds = []

    def sampler(name):
        return lambda: calls.append(name) or float(len(calls))

    samples = interleave(
        {name: sampler(name) for name in "abc"}, 20, after_round=lambda: rounds.append(len(calls))
    )
    orders = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    assert rounds == list(range(3, 61, 3))
    assert all(len(taken) == 20 for taken in samples.values())


def test_interleave_repeats_its_orders():
    def run():
        calls: list[str] = []
        samplers = {name: (lambda name=name: calls.append(name) or 0.0) for name in "abcd"}
        interleave(samplers, 5, order=random.Random(3))
        return calls

    assert run() == run()


def test_host_timer_times_run_and_not_prepare(monkeypatch):
    clock = [0]
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock[0])

    def advance(by):
        clock[0] += by
        return by

    sample = HostTimer(calls=4).sampler(lambda: advance(1_000_000), lambda state: advance(3000))
    assert sample() == 3.0


def test_host_timer_gives_each_run_its_own_state():
    seen: list[object] = []
    HostTimer(calls=3).sampler(object, seen.append)()
    assert len({id(state) for state in seen}) == 4  # one to warm up, three timed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_timer_grows_with_the_work():
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    timer = CudaTimer()
    quick = timer.sampler(lambda: None, lambda _: small @ small)
    slow = timer.sampler(lambda: None, lambda _: large @ large)
    assert min(quick() for _ in range(5)) < min(slow() for _ in range(5))
