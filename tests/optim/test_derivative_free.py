"""CMA-ES on adapters: the population in one batch, no gradient, the same search when resumed."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from optim_models import batch, ours, peft, values

pytest.importorskip("cma")

from lora_kernels import LoRAConfig, accelerate, apply_lora
from lora_kernels.nn.pairs import lora_pairs
from lora_kernels.optim import DerivativeFree

OPTIONS = {"dim": 20, "popsize": 8, "seed": 1}


def fresh(dtype=torch.float32):
    return ours(dtype, init_lora_weights=True, lora_alpha=8)


def losses_of(model):
    target = torch.randn(5, 3, 9, generator=torch.Generator().manual_seed(7))

    def losses(tokens):
        assert not torch.is_grad_enabled()
        y = model(tokens)
        return (y - target.to(y.dtype).repeat(len(tokens) // 5, 1, 1)).square().mean((1, 2))

    return losses


def test_it_starts_at_the_base():
    model, base = fresh(), fresh()
    DerivativeFree(model, **OPTIONS)
    assert torch.equal(model(batch()), base(batch()))
    assert not any(p.requires_grad for pair in lora_pairs(model) for p in (pair.lora_a, pair.lora_b))


def test_the_loss_only_falls_and_far():
    """Towards a model of the same search space, which is ten times nearer after some hundred candidates."""
    targets = {"init_lora_weights": True, "target_modules": ["tall", "square"], "r": 2}
    teacher, model, seen = ours(torch.float32, **targets), ours(torch.float32, **targets), []
    options = OPTIONS | {"dim": 6}
    for search in DerivativeFree(teacher, **options)._searches:
        search.z = torch.randn(6, dtype=torch.float64)
        search.write()
    target = teacher(batch()).detach()

    def losses(tokens):
        seen.append(len(tokens))
        return (model(tokens) - target.repeat(len(tokens) // 5, 1, 1)).square().mean((1, 2))

    optimizer = DerivativeFree(model, **options)
    path = [(model(batch()) - target).square().mean().item()]
    path += [optimizer.step(losses, batch()) for _ in range(60)]
    assert (model(batch()) - target).square().mean().item() == pytest.approx(path[-1], rel=1e-4)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(path))
    assert path[-1] < 0.1 * path[0]
    assert set(seen) == {6, 5 * 9}  # a trial; eight candidates and the present one


@pytest.mark.parametrize("kind", ["ours", "peft", "accelerated"])
def test_a_population_in_one_batch_is_each_alone(kind):
    if kind == "ours":
        model = fresh(torch.float64)
    else:
        pytest.importorskip("peft")
        model = peft(init_lora_weights=True)
        if kind == "accelerated":
            accelerate(model)
    optimizer = DerivativeFree(model, **OPTIONS)
    losses = losses_of(model)
    optimizer.step(losses, batch())
    for search in optimizer._searches:
        every = [search.z, *search.ask()]
        with torch.no_grad(), search.population(every, optimizer._rows(5, len(every))):
            together = losses(batch().repeat(len(every), 1)).view(len(every), -1)
        for z, got in zip(every, together, strict=True):
            for parameter, value in zip(
                (search.pair.lora_a, search.pair.lora_b), search.factors(z), strict=True
            ):
                parameter.data.copy_(value)
            with torch.no_grad():
                torch.testing.assert_close(got, losses(batch()), rtol=1e-9, atol=1e-9)
        search.write()


def test_it_resumes_bit_for_bit():
    model = fresh()
    optimizer = DerivativeFree(model, **OPTIONS)
    losses = losses_of(model)
    for _ in range(3):
        optimizer.step(losses, batch())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    path = [optimizer.step(losses, batch(i)) for i in range(3)]

    file.seek(0)
    other = fresh()
    resumed = DerivativeFree(other, **OPTIONS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [resumed.step(losses_of(other), batch(i)) for i in range(3)] == path
    want = values(model)
    assert all(torch.equal(value, want[key]) for key, value in values(other).items())


def test_the_generators_of_others_are_left_alone():
    import numpy

    numpy.random.seed(3)
    want = numpy.random.rand()
    numpy.random.seed(3)
    optimizer = DerivativeFree(model := fresh(), **OPTIONS)
    optimizer.fit(losses_of(model), batch(), budget=24)
    assert numpy.random.rand() == want


def test_a_batch_may_be_a_mapping():
    model = fresh()
    optimizer = DerivativeFree(model, **OPTIONS)
    inner = losses_of(model)
    given = {"tokens": batch(), "pair": [batch(), batch()], "name": "x"}
    assert optimizer.step(lambda b: inner(b["tokens"]) + 0 * b["pair"][1].sum(1), given) > 0


REFUSED = {
    "dim": ({"dim": 1}, {}, "dim: expected at least 2, got 1"),
    "popsize": ({"popsize": 1}, {}, "popsize: expected at least 2, got 1"),
    "sigma": ({"sigma": 0.0}, {}, "sigma: expected 0 < sigma"),
    "started": ({}, {"init_lora_weights": False}, "expected an adapter that is still zero"),
    "dora": ({}, {"use_dora": True}, "expected an adapter that is s · B A and no more"),
    "embedding": ({}, {"target_modules": ["table"]}, "table: expected a linear"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_it_leaves(what):
    options, config, message = REFUSED[what]
    model = ours(**({"init_lora_weights": True} | config))
    before, trained = values(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        DerivativeFree(model, **options)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert [p.requires_grad for p in model.parameters()] == trained


def test_losses_that_are_not_one_a_sample():
    model = fresh()
    optimizer = DerivativeFree(model, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"losses: expected \[9 · samples\] losses, one a sample, got shape \(\)"
    ):
        optimizer.step(lambda tokens: losses_of(model)(tokens).mean(), batch())
    assert "forward" not in vars(model.wide)


def test_a_state_of_another_search():
    optimizer = DerivativeFree(model := fresh(), **OPTIONS)
    optimizer.step(losses_of(model), batch())
    other = DerivativeFree(fresh(), dim=20, popsize=6)
    with pytest.raises(ValueError, match=r"state_dict: expected losses of \[7, 7, 7\] candidates by layer"):
        other.load_state_dict(optimizer.state_dict())


def test_a_quantised_base():
    from torch import nn

    from lora_kernels import quantize_base

    torch.manual_seed(0)
    model = quantize_base(nn.Sequential(nn.Linear(64, 8)))
    apply_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    x = torch.randn(4, 64)
    optimizer = DerivativeFree(model, sigma=0.02, **OPTIONS)
    first = model(x).square().mean().item()
    assert [optimizer.step(lambda b: model(b).square().mean(1), x) for _ in range(5)][-1] < first
