"""The demo's sizes from injected timings."""

import itertools

import pytest

from lora_kernels.cli import demo as command
from lora_kernels.demo import sizes as all_sizes
from lora_kernels.demo.sizes import WHOLE, Cost, choose, left_out


def test_a_fast_machine_runs_the_whole_job():
    sizes = choose(Cost(step=2e-3, forward=0.8e-3), 140)
    assert sizes == WHOLE and sizes.compared
    assert left_out(sizes) == []


@pytest.mark.parametrize("step", [30e-3, 50e-3])
def test_a_slow_machine_gives_up_seeds_and_texts_and_still_compares(step):
    cost = Cost(step, 0.4 * step)
    sizes = choose(cost, 120)
    assert sizes.compared and sizes.label_sets == WHOLE.label_sets
    assert sizes.seconds(cost) <= 120
    assert any(line == "seeds of LoRA 1 of 3" for line in left_out(sizes))


def test_an_absurdly_slow_machine_runs_the_least_and_says_what_it_drops():
    sizes = choose(Cost(step=10.0, forward=4.0), 100)
    assert sizes == list(all_sizes._sizes())[-1] and not sizes.compared
    said = left_out(sizes)
    assert "label sets 1 of 3" in said
    assert said[-1] == "too few to ask that LoRA beats frozen features"


def test_slower_never_chooses_more_and_less_time_neither():
    sizes = list(all_sizes._sizes())
    for times in itertools.pairwise(
        [cost * 1e-3 for cost in (1, 3, 5, 8, 13, 20, 30, 45, 70, 100, 300, 1000)]
    ):
        for limit in (60, 100, 140):
            fast, slow = (choose(Cost(t, 0.4 * t), limit) for t in times)
            assert sizes.index(fast) <= sizes.index(slow)
            assert sizes.index(fast) <= sizes.index(choose(Cost(times[0], 0.4 * times[0]), 0.8 * limit))


def test_each_size_takes_less_than_the_one_before():
    seconds = [sizes.seconds(Cost(30e-3, 11e-3)) for sizes in all_sizes._sizes()]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)


@pytest.mark.parametrize(
    ("margin", "fails"), [(0.05, False), (0.03, True), (-0.1, True), (float("nan"), True)]
)
def test_lora_has_to_beat_frozen_features_by_more_than_the_spread(margin, fails):
    outcome = type("Outcome", (), {"task": "package", "margin": margin, "spread": 0.03})
    assert bool(command._beaten([outcome])) == fails
