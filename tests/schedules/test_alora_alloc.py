"""ALoRA's allocator against a slow loop over ablations, and what a move of ranks must not change."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, loss, ours
from schedule_cases import adam

from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.schedules import ALoRAAllocator, compact

NAMES = ("wide", "tall", "square")


def model(**options):
    net = ours(method="alora_alloc", **options)
    for name in NAMES:
        torch.manual_seed(len(name))
        net.get_submodule(name).adapters["default"].lora_B.data.normal_()
    return net


def allocator(net, **options):
    return ALoRAAllocator(net, lambda: loss(net, 70), **options)


def adapters(net):
    return {name: net.get_submodule(name).adapters["default"] for name in NAMES}


def loss_of(net, on):
    """The loss of the model whose W hold these ranks (layer, i)."""
    plain = {}
    for name, one in adapters(net).items():
        layer = net.get_submodule(name)
        plain[name] = layer.weight.data.clone()
        for i in range(one.r):
            if (name, i) in on:
                layer.weight.data += one.scaling * torch.outer(one.lora_B[:, i], one.lora_A[i])
        layer.enable_adapters(False)
    value = loss(net, 70).item()
    for name, weight in plain.items():
        layer = net.get_submodule(name)
        layer.weight.data.copy_(weight)
        layer.enable_adapters(True)
    return value


@torch.no_grad()
def test_scores_are_those_of_a_loop_over_ablations():
    net = model(lora_dropout=0.5).train()
    schedule = allocator(net)
    live = {(name, i) for name, one in adapters(net).items() for i in range(4) if one.alive[i]}
    assert len(live) == 6 and schedule.ranks == dict.fromkeys(NAMES, 2)
    scores = schedule.scores()
    net.eval()
    for name in NAMES:
        for i in range(4):
            if (name, i) in live:
                want = loss_of(net, live - {(name, i)}) - loss_of(net, {(name, i)})
                assert scores[name][i].item() == pytest.approx(want, rel=1e-5, abs=1e-6)
            else:
                assert scores[name][i] == torch.inf
    assert {(n, i) for n, one in adapters(net).items() for i in range(4) if one.alive[i]} == live


def off(*values):
    return torch.tensor([*values, *[torch.inf] * (4 - len(values))])


def test_the_least_go_and_those_that_lost_none_gain():
    net = model()
    schedule = allocator(net)
    schedule.allocate({"wide": off(0.1, 0.2), "tall": off(0.3, 0.9), "square": off(5.0, 6.0)})
    # wide loses both and tall one: of the three, square has room for two.
    assert schedule.ranks == {"wide": 0, "tall": 1, "square": 4}
    assert adapters(net)["tall"].alive.tolist() == [False, True, False, False]


def test_what_is_left_of_the_division_goes_to_the_more_important():
    net = model()
    schedule = allocator(net)
    adapters(net)["wide"].alive[2] = True
    schedule.allocate({"wide": off(0.1, 0.2, 0.3), "tall": off(3.0, 4.0), "square": off(5.0, 6.0)})
    assert schedule.ranks == {"wide": 0, "tall": 3, "square": 4}


def test_where_all_lost_some_none_gains():
    net = model()
    schedule = allocator(net)
    schedule.allocate({name: off(0.1, 9.0) for name in NAMES})
    assert schedule.ranks == dict.fromkeys(NAMES, 1)


def test_new_ranks_change_no_output_and_are_forgotten():
    net = model()
    optimizer = adam(net)
    loss(net).backward()
    optimizer.step()
    schedule = allocator(net, optimizer=optimizer)
    one = adapters(net)["square"]
    for factor in (one.lora_A, one.lora_B):
        optimizer.state[factor]["exp_avg"].fill_(1.0)
    for name in ("wide", "tall"):
        adapters(net)[name].lora_B.data.zero_()
    y, row = net(batch()), one.lora_A[2].clone()
    schedule.allocate({"wide": off(0.1, 0.2), "tall": off(0.3, 0.9), "square": off(5.0, 6.0)})
    assert schedule.ranks["square"] == 4
    torch.testing.assert_close(net(batch()), y, rtol=0, atol=0)
    assert not torch.equal(one.lora_A[2], row) and one.lora_A[2].abs().max() <= 1 / 3
    moments = optimizer.state[one.lora_A]["exp_avg"], optimizer.state[one.lora_B]["exp_avg"].T
    assert all(m[:2].eq(1).all() and m[2:].eq(0).all() for m in moments)


def test_rounds_come_when_they_are_due_and_never_pass_the_budget():
    net = model()
    optimizer = adam(net)
    schedule = allocator(net, optimizer=optimizer, first=3, every=2, rounds=2)
    budget, seen = 6, []
    for seed in range(9):
        optimizer.zero_grad()
        loss(net, seed).backward()
        optimizer.step()
        schedule.step()
        seen.append(schedule.done)
        assert sum(schedule.ranks.values()) <= budget
    assert seen == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    y = net(batch())
    ranks = compact(net)
    assert all(ranks[name] <= max(1, schedule.ranks[name]) for name in NAMES)
    torch.testing.assert_close(net(batch()), y)


def test_bad_options():
    for options, words in (
        ({"first": 0}, "first: expected at least 1, got 0"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            allocator(model(), **options)
    with pytest.raises(ValueError, match="active: expected at least 1, got 0"):
        make(4, 4, LoRAConfig(method="alora_alloc", method_options={"active": 0}))
    assert make(4, 4, LoRAConfig(r=3, method="alora_alloc", method_options={"active": 9})).alive.all()
