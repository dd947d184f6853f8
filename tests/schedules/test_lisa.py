"""LISA: exactly γ blocks train, each as often as the others."""

from __future__ import annotations

import pytest
import torch
from optim_models import net, values
from schedule_cases import adam, fresh, run

from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import LISA


def blocks(model):
    return [model.wide, model.tall, model.square]


def test_frozen_blocks_stay_and_the_rest_moves():
    model = net(torch.float32)
    optimizer = adam(model)
    schedule = LISA(model, blocks(model), n_active=1, interval=2)
    for first in range(0, 8, 2):
        active, before = schedule.active, values(model)
        run(model, optimizer, schedule, 2, first)
        for i, block in enumerate(("wide", "tall", "square")):
            same = torch.equal(values(model)[f"{block}.weight"], before[f"{block}.weight"])
            assert same == (i not in active)
        assert not torch.equal(values(model)["norm.weight"], before["norm.weight"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "table.weight"} <= trains and len(trains) < len(list(model.parameters()))


def test_with_adapters_their_factors_take_turns():
    model = fresh()
    LISA(model, blocks(model), n_active=2)
    assert sorted(pair.lora_a.requires_grad for pair in lora_pairs(model)) == [False, True, True]
    assert not any(block.weight.requires_grad for block in blocks(model))


def test_each_block_has_its_share():
    model = net()
    schedule = LISA(model, blocks(model), n_active=2, interval=1)
    counts = torch.zeros(3)
    for _ in range(600):
        schedule.step()
        assert len(schedule.active) == 2
        counts[schedule.active] += 1
    assert (counts / 600 - 2 / 3).abs().max() < 0.06


def test_state_is_dropped_where_asked():
    model = net(torch.float32)
    optimizer = adam(model)
    schedule = LISA(model, blocks(model), optimizer, n_active=1, interval=1, drop_state=True)
    run(model, optimizer, schedule, 5)
    held = [block.weight in optimizer.state for block in blocks(model)]
    assert not any(kept for i, kept in enumerate(held) if i not in schedule.active)
    assert model.norm.weight in optimizer.state


def test_all_blocks_are_plain_training():
    one, other = net(torch.float32), net(torch.float32)
    optimizers = adam(one), adam(other)
    run(one, optimizers[0], LISA(one, blocks(one), n_active=3, interval=1), 3)
    run(other, optimizers[1], LISA(other, blocks(other), n_active=3, interval=50), 3)
    assert all(torch.equal(value, values(other)[name]) for name, value in values(one).items())


def test_bad_input():
    model = net()
    with pytest.raises(ValueError, match="n_active: expected at most the 3 blocks, got 4"):
        LISA(model, blocks(model), n_active=4)
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected a module of the model"):
        LISA(model, [model.wide, torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected parameters of its own"):
        LISA(model, [model.wide, model.wide])
    with pytest.raises(TypeError, match=r"blocks\[0\]: expected an nn.Module, got str"):
        LISA(model, ["wide"])
    model.tall.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected something that trains in it"):
        LISA(model, blocks(model))
    assert model.wide.weight.requires_grad
    model.tall.requires_grad_(True)
    schedule = LISA(model, blocks(model), n_active=1)
    with pytest.raises(ValueError, match=r"state\['active'\]: expected blocks below 3, got \[7\]"):
        schedule.load_state_dict({**schedule.state_dict(), "active": [7]})
