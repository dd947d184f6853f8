"""ReLoRA: merges, restarts, pruned moments, the jagged rate."""

from __future__ import annotations

import math

import pytest
import torch
from optim_models import accelerated, batch, net, ours, values
from schedule_cases import adam, fresh, run

from lora_kernels import quantize_base
from lora_kernels.nn import lora_pairs
from lora_kernels.schedules import ReLoRA, jagged_cosine


def peft_accelerated():
    return accelerated(init_lora_weights=True)


@pytest.mark.parametrize("make", [lambda: fresh(torch.float64), peft_accelerated], ids=["ours", "peft"])
def test_restarts_keep_the_function_and_add_ranks(make):
    model = make()
    optimizer = adam(model)
    schedule = ReLoRA(model, optimizer, every=5, ratio=1.0)
    starts = {pair.name: pair.weight.clone() for pair in lora_pairs(model)}
    for restarts in (1, 2):
        run(model, optimizer, schedule, 4)
        want = {
            pair.name: pair.weight + pair.scaling * pair.lora_b @ pair.lora_a for pair in lora_pairs(model)
        }
        y, drawn = model(batch()), {pair.name: pair.lora_a.clone() for pair in lora_pairs(model)}
        schedule.step()
        torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
        for pair in lora_pairs(model):
            torch.testing.assert_close(pair.weight, want[pair.name], rtol=1e-13, atol=1e-13)
            assert not pair.lora_b.any() and pair.lora_a.abs().max() <= 1 / math.sqrt(pair.lora_a.shape[1])
            assert not torch.equal(pair.lora_a, drawn[pair.name])
            moved = torch.linalg.matrix_rank(pair.weight - starts[pair.name], atol=1e-9)
            assert moved == min(restarts * pair.rank, *pair.weight.shape)
    assert not any(moment.any() for moment in schedule.moments())


@pytest.mark.parametrize("prune", ["magnitude", "random"])
def test_moments_are_pruned_to_the_ratio(prune):
    model = fresh(torch.float64)
    optimizer = adam(model)
    schedule = ReLoRA(model, optimizer, every=4, prune=prune, ratio=0.75)
    run(model, optimizer, schedule, 3)
    before = [moment.clone() for moment in schedule.moments()]
    assert len(before) == 12 and all(moment.all() for moment in before)
    norm = dict(model.named_parameters())["norm.weight"]
    kept = optimizer.state[norm]["exp_avg"].clone()
    schedule.step()
    assert torch.equal(optimizer.state[norm]["exp_avg"], kept)
    for old, new in zip(before, schedule.moments(), strict=True):
        assert (new == 0).sum() == int(0.75 * new.numel())
        assert torch.equal(new[new != 0], old[new != 0])
        if prune == "magnitude":
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()


def test_the_first_period_begins_after_the_start():
    schedule = ReLoRA(fresh(), None, every=3, start=2)
    assert [step for step in range(1, 12) if schedule.due(step)] == [5, 8, 11]


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_over_a_quantised_base(format):
    model = quantize_base(ours(torch.float32), format, target_modules=["wide"])
    pair = next(one for one in lora_pairs(model) if one.name == "wide")
    from lora_kernels import dequantize

    want = dequantize(pair.layer.weight) + pair.scaling * (pair.lora_b @ pair.lora_a).detach()
    ReLoRA(model, adam(model), every=1).step()
    got = pair.layer.weight
    assert (got.format == format and got.block == 64) or format != "nf4"
    assert (dequantize(got) - want).abs().max() < 0.15 * want.abs().max()
    assert not pair.lora_b.any()


def test_jagged_cosine_is_its_formula():
    factor = jagged_cosine(100, 25, warmup=5, first_warmup=10, floor=0.2)

    def cosine(t):
        return 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (t - 10) / 90))

    assert [factor(t) for t in (0, 5, 25, 50, 75)] == [0, 0.5, 0, 0, 0]
    assert factor(10) == 1 and factor(24) == cosine(24) and factor(30) == cosine(30)
    assert factor(52) == pytest.approx(0.4 * cosine(55))
    assert factor(99) == cosine(99) and factor(500 + 10) == pytest.approx(0.2)


def tied():
    """A model whose `square` is held a second time."""
    model = ours()
    model.again = torch.nn.Linear(9, 9, bias=False)
    model.again.weight = model.square.weight
    return model


BAD = {
    "every": (lambda: ReLoRA(ours(), every=0), "every: expected at least 1, got 0"),
    "ratio": (lambda: ReLoRA(ours(), ratio=1.5), "ratio: expected at most 1, got 1.5"),
    "prune": (lambda: ReLoRA(ours(), prune="all"), "prune: expected 'magnitude' or 'random', got 'all'"),
    "start": (lambda: ReLoRA(ours(), start=-1), "start: expected 0 <= start"),
    "method": (lambda: ReLoRA(ours(method="sora")), r"model: wide: expected an adapter that is s · B A"),
    "tied": (lambda: ReLoRA(tied()), "model: square: expected a weight of its own, got one that is tied"),
    "taken": (
        lambda: ReLoRA(ours(init_lora_weights="pissa")),
        "model: wide: expected a W that no start took",
    ),
    "warmup": (lambda: jagged_cosine(100, 10, warmup=10), "warmup: expected fewer than the 10 steps"),
    "total": (lambda: jagged_cosine(100, 200, warmup=10), "total: expected more than 199 steps, got 100"),
    "first": (lambda: jagged_cosine(50, 20, warmup=9, first_warmup=50), "total: expected more than 50"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_merged_layer_is_refused_at_the_step():
    model = fresh()
    schedule = ReLoRA(model, adam(model), every=1)
    model.wide.merge()
    before = values(model)
    with pytest.raises(ValueError, match="model: wide: expected adapters that are not merged"):
        schedule.step()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert net() is not None
