"""What DyLoRA's sampler and SoRA's schedule promise."""

from __future__ import annotations

import pytest
import torch
from schedule_cases import adam, fresh, run

from lora_kernels.adapters import SoRA
from lora_kernels.nn import lora_layers
from lora_kernels.schedules import DyLoRASampler, SoRASchedule, gate_penalty


def ranks(model):
    return [layer.adapters["default"].rank for layer in lora_layers(model).values()]


def test_one_rank_for_all_layers_uniform_and_by_seed():
    model, other = fresh(method="dylora"), fresh(method="dylora")
    sampler, again = DyLoRASampler(model, seed=1), DyLoRASampler(other, seed=1)
    drawn = []
    for _ in range(2000):
        assert len(set(ranks(model))) == 1 and ranks(model) == ranks(other)
        drawn.append(ranks(model)[0])
        sampler.step()
        again.step()
    counts = torch.bincount(torch.tensor(drawn), minlength=5)[1:]
    assert (counts - 500).abs().max() < 4 * (2000 * 0.25 * 0.75) ** 0.5
    sampler.finish(2)
    assert set(ranks(model)) == {2}
    sampler.finish()
    assert set(ranks(model)) == {4}
    with pytest.raises(ValueError, match="rank: expected 1 to 4, got 5"):
        sampler.finish(5)


def test_a_smaller_layer_takes_what_it_has():
    model = fresh(method="dylora", rank_pattern={"tall": 2})
    sampler = DyLoRASampler(model)
    for _ in range(20):
        wide, tall, square = ranks(model)
        assert wide == square == sampler.rank and tall == min(2, wide)
        sampler.step()


def gates(model):
    return torch.cat([one.gate.detach() for one in model.modules() if isinstance(one, SoRA)])


def test_the_proximal_step_and_its_stages():
    model = fresh(method="sora")
    optimizer, schedule = adam(model), SoRASchedule(model, xis=(0.0, 0.05, 0.2), steps=(2, 3, 4))
    assert [schedule.stage(step) for step in (1, 2, 3, 5, 6, 9, 99)] == [0, 0, 1, 1, 2, 2, 2]
    run(model, optimizer, schedule, 2)
    assert schedule.sparsity == [0.0]
    for adapter in (one for one in model.modules() if isinstance(one, SoRA)):
        with torch.no_grad():
            adapter.gate.copy_(torch.tensor([0.04, -0.04, 1.0, -1.0]))
    schedule.step()
    want = torch.tensor([0.0, 0.0, 0.95, -0.95]).repeat(3)
    torch.testing.assert_close(gates(model), want)
    run(model, optimizer, schedule, 6, first=3)
    assert len(schedule.sparsity) == 3 and schedule.sparsity == sorted(schedule.sparsity)


def test_the_penalty():
    model = fresh(method="sora")
    torch.testing.assert_close(gate_penalty(model), gates(model).abs().sum() / 12)
    gate_penalty(model).backward()
    with pytest.raises(ValueError, match="model: expected adapters of the method 'sora', got none"):
        gate_penalty(fresh())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"xis": (0.1,), "steps": (1, 2)}, "steps: expected one for each of 1 xis, got 2"),
        ({"xis": (0.2, 0.1), "steps": (1, 2)}, r"xis\[1\]: expected 0.2 <= xis\[1\], got 0.1"),
        ({"xis": (0.2,), "steps": (0,)}, r"steps\[0\]: expected at least 1, got 0"),
        ({"xis": (), "steps": ()}, "steps: expected one for each of 0 xis"),
    ],
)
def test_what_it_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        SoRASchedule(fresh(method="sora"), **options)
