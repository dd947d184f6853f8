"""Compact factors: the output stays, on our methods and PEFT's, and what is saved is read back."""

from __future__ import annotations

import pytest
import torch
from optim_models import batch, loss, net, ours, train
from optim_models import peft as peft_model
from schedule_cases import CASES, adam, run

from lora_kernels import accelerate, load_adapter, save_adapter
from lora_kernels.nn import apply_lora, lora_pairs
from lora_kernels.schedules import compact
from lora_kernels.schedules.compact import _TENSORS


@torch.no_grad()
def prune(model):
    """Leaves 2, 1 and none of the four ranks."""
    wide, tall, square = lora_pairs(model)
    wide.lora_a[[0, 2]] = 0
    tall.lora_b[:, 1:] = 0
    square.lora_a.zero_()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_stays_and_a_file_is_read_back(rslora, tmp_path):
    model = ours(use_rslora=rslora)
    prune(model)
    y = model(batch())
    assert compact(model) == {"wide": 2, "tall": 1, "square": 1}
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
    assert model.wide.adapters["default"].lora_A.shape == (2, 12)
    save_adapter(model, tmp_path)
    other = net()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(batch()), y, rtol=1e-6, atol=1e-6)


def test_a_gate_counts():
    model = ours(method="sora")
    with torch.no_grad():
        for layer in (model.wide, model.tall, model.square):
            layer.adapters["default"].gate[1:3] = 0
    y = model(batch())
    assert compact(model) == {"wide": 2, "tall": 2, "square": 2}
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)


def zeroed(name, places):
    def cut(adapter):
        getattr(adapter, name).data[places] = 0

    return cut


def few_bits(adapter):
    adapter.rank_gates.data[2:] = -4.0
    adapter.bit_gates.data[:, 2:] = -4.0
    adapter.noise = torch.rand(12 + 3, dtype=torch.float64)


# Method -> what an allocation or a pruning leaves behind, and the rank that contributes.
CUT = {
    "lora": (zeroed("lora_A", [0, 2]), 2),
    "advlora": (zeroed("lora_A", [0, 2]), 2),
    "sora": (zeroed("gate", [1]), 3),
    "adalora": (zeroed("lora_E", [1, 2]), 2),
    "alora_alloc": (lambda one: None, 2),
    "blora": (few_bits, 2),
    "dylora": (lambda one: one.set_rank(3), 3),
    "lonas": (lambda one: one.set_rank(2), 2),
}


@pytest.mark.parametrize("method", CUT)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_after_every_allocation(method, options, tmp_path):
    cut, rank = CUT[method]
    model = ours(method=method, **options).eval()
    for layer in (model.wide, model.tall, model.square):
        adapter = layer.adapters["default"]
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                getattr(adapter, name).normal_(std=0.1)
        cut(adapter)
    with torch.no_grad():
        y = model(batch())
    assert set(compact(model).values()) == {rank}
    torch.testing.assert_close(model(batch()), y, rtol=1e-9, atol=1e-9)
    assert model.wide.adapters["default"].lora_A.shape == (rank, 12)
    save_adapter(model, tmp_path)
    other = load_adapter(net(), tmp_path).eval()
    torch.testing.assert_close(other(batch()), y, rtol=1e-6, atol=1e-6)
    loss(model.train()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# What takes ranks away, or numbers of them, and what steps freely do.
ALLOCATORS = (
    *("adalora", "alora_alloc", "blora", "dylora_sampler", "sora_schedule"),
    *("prilora", "roselora", "relora", "plora", "lorasc"),
)


@pytest.mark.parametrize("key", ALLOCATORS)
def test_once_a_schedule_has_run(key):
    make_model, make = CASES[key]
    model = make_model()
    optimizer = adam(model)
    run(model, optimizer, make(model, optimizer), 8)
    model.eval()
    before = {pair.name: pair.rank for pair in lora_pairs(model)}
    with torch.no_grad():
        y = model(batch())
    after = compact(model)
    torch.testing.assert_close(model(batch()), y, rtol=1e-5, atol=1e-5)
    assert all(1 <= after[name] <= rank for name, rank in before.items())
    fewer = sum(after.values()) < sum(before.values())
    assert fewer or key not in ("adalora", "alora_alloc", "dylora_sampler")


def test_every_method_that_shrinks_is_tried():
    assert set(CUT) == set(_TENSORS)


@pytest.mark.parametrize("fused", [False, True])
def test_on_a_peft_model(fused, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft_model()
    if fused:
        accelerate(model)
    prune(model)
    y = model(batch())
    ranks = compact(model)
    assert sorted(ranks.values()) == [1, 1, 2]
    torch.testing.assert_close(model(batch()), y, rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(net(), tmp_path).double()
    torch.testing.assert_close(other(batch()), y, rtol=1e-6, atol=1e-6)


def test_bad_input_changes_nothing():
    with pytest.raises(ValueError, match="model: expected a model with LoRA layers"):
        compact(net())
    model = ours(method="moslora", init_lora_weights=True)
    with pytest.raises(ValueError, match=r"model: wide: expected one of lora, .*, lonas, .*, got moslora"):
        compact(model)
    merged = ours()
    prune(merged)
    merged.square.merge()
    with pytest.raises(ValueError, match="model: square: expected adapters that are not merged"):
        compact(merged)
    assert merged.wide.adapters["default"].lora_A.shape == (4, 12) and apply_lora is not None


KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def trained_and_pruned(make, kind):
    """A model of ours or PEFT's in the midst of training, some of its ranks zero in factors and moments."""
    model = make()
    optimizer = KINDS[kind]([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 2)
    with torch.no_grad():
        for pair in lora_pairs(model):
            for factor, dim in ((pair.lora_a, 0), (pair.lora_b, 1)):
                dead = torch.tensor([1, 2])
                factor.index_fill_(dim, dead, 0)
                for moment in optimizer.state[factor].values():
                    if moment.shape == factor.shape:
                        moment.index_fill_(dim, dead, 0)
    return model, optimizer


@pytest.mark.parametrize("make", [ours, peft_model])
@pytest.mark.parametrize("kind", ["adamw", "adamw, fused", "sgd"])
def test_an_optimiser_that_is_given_goes_on_as_if_the_ranks_were_there(make, kind):
    whole, optimizer = trained_and_pruned(make, kind)
    train(whole, optimizer, 3, first=2)
    cut, optimizer = trained_and_pruned(make, kind)
    assert set(compact(cut, optimizer=optimizer).values()) == {2}
    train(cut, optimizer, 3, first=2)
    torch.testing.assert_close(cut(batch()), whole(batch()), rtol=1e-12, atol=1e-12)


def test_moments_of_other_shapes_are_forgotten():
    model, optimizer = trained_and_pruned(ours, "adafactor")
    compact(model, optimizer=optimizer)
    assert not any(pair.lora_a in optimizer.state for pair in lora_pairs(model))
    train(model, optimizer, 2)


@pytest.mark.parametrize("kind", ["adamw", "adamw, fused", "sgd"])
def test_an_optimiser_that_knows_the_old_ranks_refuses_its_step(kind):
    model, optimizer = trained_and_pruned(ours, kind)
    compact(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"moments of the shape \(2, 12\) for wide, got \(4, 12\)"):
            train(model, optimizer, 1)
    train(model, KINDS[kind]([p for p in model.parameters() if p.requires_grad]), 2)


def test_what_is_no_optimiser_is_refused():
    with pytest.raises(TypeError, match="optimizer: expected a torch optimiser, got str"):
        compact(ours(), optimizer="adam")
