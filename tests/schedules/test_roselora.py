"""RoseLoRA: the masks, the schedule, the bound on ΔW."""

from __future__ import annotations

import math

import pytest
import torch
from optim_models import accelerated, ours
from schedule_cases import adam, fresh, run

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import RoseLoRA
from lora_kernels.schedules.roselora import keep_important_


@pytest.mark.parametrize("make", [lambda: fresh(torch.float64), accelerated], ids=["ours", "peft"])
def test_rows_and_columns_are_sparse(make):
    model = make()
    optimizer = adam(model)
    run(model, optimizer, RoseLoRA(model, density=0.25, t_i=1, t_f=4), 6)
    for pair in lora_pairs(model):
        rows, columns = pair.lora_a.count_nonzero(1), pair.lora_b.count_nonzero(0)
        assert rows.max() <= math.ceil(0.25 * pair.lora_a.shape[1]) + 1
        assert columns.max() <= math.ceil(0.25 * pair.lora_b.shape[0]) + 1
        assert (pair.lora_b @ pair.lora_a).count_nonzero() <= (rows * columns).sum()
        assert rows.min() > 0


def test_it_is_the_loop_by_hand():
    model = fresh(torch.float64)
    optimizer = adam(model)
    schedule = RoseLoRA(model, density=0.3, t_i=2, t_f=5, beta=0.8)
    mean = {}
    for step in range(1, 7):
        before = {pair.name: pair for pair in lora_pairs(model)}
        run_one(model, optimizer, step)
        want = {}
        for name, pair in before.items():
            for letter, p, dim in (("A", pair.lora_a, 1), ("B", pair.lora_b, 0)):
                now = (p * p.grad).abs().detach()
                key = f"{name}:default.{letter}"
                mean[key] = now if step == 1 else 0.8 * mean[key] + 0.2 * now
                kept = p.detach().clone()
                count = int(p.shape[dim] * (1 - schedule.density_at(step)))
                for line, score in zip(kept.unbind(1 - dim), mean[key].unbind(1 - dim), strict=True):
                    if count:
                        line[score < score.sort().values[count - 1]] = 0
                want[key] = kept
        schedule.step()
        for name, (p, _) in schedule.factors.items():
            assert torch.equal(p, want[name]), (step, name)


def run_one(model, optimizer, seed):
    class Nothing:
        def step(self):
            pass

    run(model, optimizer, Nothing(), 1, seed)


def test_the_schedule_falls_by_a_cubic():
    schedule = RoseLoRA(fresh(), density=0.1, t_i=2, t_f=6)
    got = [schedule.density_at(step) for step in range(1, 9)]
    assert got[:2] == [1, 1] and got[5:] == pytest.approx([0.1] * 3)
    assert got == sorted(got, reverse=True) and got[3] == pytest.approx(0.1 + 0.9 / 8)


def test_all_of_it_is_lora():
    one, other = fresh(), fresh()
    optimizer = adam(one)
    run(one, optimizer, RoseLoRA(one, density=1.0, t_i=0, t_f=1), 3)
    for step in range(3):
        run_one(other, optimizer := (adam(other) if step == 0 else optimizer), step)
    for mine, theirs in zip(lora_pairs(one), lora_pairs(other), strict=True):
        assert torch.equal(mine.lora_b, theirs.lora_b) and torch.equal(mine.lora_a, theirs.lora_a)


def test_bad_input():
    weight = torch.ones(2, 3)
    keep_important_(weight, torch.arange(6.0).view(2, 3), 0.4, 1)
    assert weight.tolist() == [[1, 1, 1]] * 2  # ⌊1.8⌋ = 1: what is below the smallest
    for options, message in (
        ({"density": 0}, "density: expected 0 < density"),
        ({"density": 2}, "density: expected at most 1, got 2"),
        ({"t_i": 5, "t_f": 5}, "t_f: expected more than t_i = 5 steps, got 5"),
        ({"beta": 1.0}, "beta: expected 0 <= beta < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RoseLoRA(ours(), **options)
    schedule = RoseLoRA(ours())
    with pytest.raises(ValueError, match=r"expected a gradient \(step before zero_grad\), got None"):
        schedule.step()
