"""What the contract promises methods, by small methods that use each part of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import (
    METHODS,
    Adapter,
    Added,
    Dense,
    LoRA,
    LoRAConfig,
    LowRank,
    Site,
    Start,
    apply_update,
)
from lora_kernels.nn import LoRALinear, QuantizedLinear, apply_lora, lora_layers, remove_lora, side_inputs

IN, OUT, R = 12, 10, 4
WIDE = torch.float64


def tensors(*shapes):
    return [torch.randn(*shape, dtype=WIDE, requires_grad=True) for shape in shapes]


UPDATES = {
    "plain": (lambda a, b, g, h, d: LowRank(a, b, 0.5), lambda x, a, b, g, h, d: 0.5 * x @ a.T @ b.T),
    "gate": (lambda a, b, g, h, d: LowRank(a, b, 0.5, g), lambda x, a, b, g, h, d: 0.5 * (x @ a.T * g) @ b.T),
    "a scale for each row": (
        lambda a, b, g, h, d: LowRank(a, b, 0.5, h.sum(-1, keepdim=True)),
        lambda x, a, b, g, h, d: 0.5 * h.sum(-1, keepdim=True) * (x @ a.T @ b.T),
    ),
    "a scale for each sample": (
        lambda a, b, g, h, d: LowRank(a, b, 0.5, h.sum((1, 2))[:, None, None]),
        lambda x, a, b, g, h, d: 0.5 * h.sum((1, 2))[:, None, None] * (x @ a.T @ b.T),
    ),
    "a gate for each row": (
        lambda a, b, g, h, d: LowRank(a, b, 0.5, h),
        lambda x, a, b, g, h, d: 0.5 * (x @ a.T * h) @ b.T,
    ),
    "no A": (
        lambda a, b, g, h, d: LowRank(None, b, 0.5, g, h.sin()),
        lambda x, a, b, g, h, d: 0.5 * (h.sin() * g) @ b.T,
    ),
    "an input of its own": (
        lambda a, b, g, h, d: LowRank(a, b, 0.5, g, h.mean() + torch.ones(2, 3, IN, dtype=WIDE)),
        lambda x, a, b, g, h, d: 0.5 * ((h.mean() + torch.ones(2, 3, IN, dtype=WIDE)) @ a.T * g) @ b.T,
    ),
    "an input of another width": (
        lambda a, b, g, h, d: LowRank(a[:, :5], b, 0.5, g, h.mean() + torch.ones(2, 3, 5, dtype=WIDE)),
        lambda x, a, b, g, h, d: 0.5 * ((h.mean() + torch.ones(2, 3, 5, dtype=WIDE)) @ a[:, :5].T * g) @ b.T,
    ),
    "factors for each sample": (
        lambda a, b, g, h, d: LowRank(torch.stack([a, a.sin()]), torch.stack([b, b.cos()]), 0.5, g),
        lambda x, a, b, g, h, d: torch.stack(
            [0.5 * (x[0] @ a.T * g) @ b.T, 0.5 * (x[1] @ a.sin().T * g) @ b.cos().T]
        ),
    ),
    "A for each sample": (
        lambda a, b, g, h, d: LowRank(torch.stack([a, a.sin()]), b, 0.5),
        lambda x, a, b, g, h, d: torch.stack([0.5 * x[0] @ a.T @ b.T, 0.5 * x[1] @ a.sin().T @ b.T]),
    ),
    "a trained scale": (
        lambda a, b, g, h, d: LowRank(a, b, g[:1].exp(), g),
        lambda x, a, b, g, h, d: g[:1].exp() * ((x @ a.T * g) @ b.T),
    ),
    "dense": (lambda a, b, g, h, d: Dense(d), lambda x, a, b, g, h, d: x @ d.T),
    "added": (
        lambda a, b, g, h, d: Added(torch.tanh(h) @ b.T),
        lambda x, a, b, g, h, d: torch.tanh(h) @ b.T,
    ),
}


@pytest.mark.parametrize("base", ["dense", "none", "quantised"])
@pytest.mark.parametrize("name", UPDATES)
def test_every_update_is_what_it_says(name, base):
    torch.manual_seed(0)
    make, want = UPDATES[name]
    leaves = tensors((R, IN), (OUT, R), (R,), (2, 3, R), (OUT, IN))
    (x,), bias = tensors((2, 3, IN)), torch.randn(OUT, dtype=WIDE)
    weight = None if base == "none" else torch.randn(OUT, IN, dtype=WIDE)
    reference = weight
    if base == "quantised":
        layer = QuantizedLinear.from_linear(nn.Linear(IN, OUT).double(), "int8")
        weight, reference = layer.weight, layer.to_linear().weight.detach().double()
    y = apply_update(x, weight, None if weight is None else bias, make(*leaves))
    expected = want(x, *leaves)
    expected = expected if reference is None else expected + F.linear(x, reference, bias)
    tolerance = {"rtol": 1e-12, "atol": 1e-11} if base != "quantised" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **tolerance)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *leaves], dy, allow_unused=True)
    theirs = torch.autograd.grad(expected, [x, *leaves], dy, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        zero = torch.zeros((), dtype=WIDE)
        one, other = (zero if g is None else g for g in (one, other))
        torch.testing.assert_close(one.expand_as(other), other.expand_as(one), **tolerance)


def known(monkeypatch, cls, key):
    cls.method = key
    monkeypatch.setitem(METHODS._classes, key, cls)
    return LoRAConfig(r=R, method=key, target_modules="all-linear")


class Bank(LoRA):
    """B = c · bank, the bank one for all sites of one width."""

    peft = False

    def build(self, site: Site) -> Start:
        bank = site.shared(("bank", site.out_features), lambda: torch.randn(site.out_features, R))
        return Start({"lora_A": site.kaiming(R, site.in_features), "c": site.zeros(1), "bank": bank})

    def lower(self, x=None, call=None) -> LowRank:
        return LowRank(self.lora_A, self.bank * self.c)


def chain(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))


def test_what_sites_share_is_one_tensor_saved_and_loaded_once(monkeypatch, tmp_path):
    config = known(monkeypatch, Bank, "bank")
    model = apply_lora(chain(), config)
    banks = {id(layer.adapters["default"].bank) for layer in lora_layers(model).values()}
    assert len(banks) == 1 and len(list(model.parameters())) == 2 * 3 + 2 * 3 + 1
    for copied in (copy.deepcopy(model), model.double().float()):
        assert len({id(layer.adapters["default"].bank) for layer in lora_layers(copied).values()}) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    save_adapter(model, tmp_path)
    other, x = load_adapter(chain(), tmp_path), torch.randn(2, 6)
    assert torch.equal(other(x), model(x))
    assert len({id(layer.adapters["default"].bank) for layer in lora_layers(other).values()}) == 1
    apply_lora(model, config, "second")
    layer = model[0]
    assert layer.adapters["second"].bank is not layer.adapters["default"].bank


class Principal(LoRA):
    """PiSSA's start: A and B from W's leading singular vectors, which W then lacks."""

    peft = False

    def build(self, site: Site) -> Start:
        u, s, vh = torch.linalg.svd(site.weight.detach(), full_matrices=False)
        lora_a, lora_b = s[:R, None] * vh[:R] / self.scaling, u[:, :R]
        rest = site.weight - self.scaling * lora_b @ lora_a
        return Start({"lora_A": lora_a, "lora_B": lora_b}, rest)


def test_a_start_that_takes_something_out_of_the_weight(monkeypatch, tmp_path):
    config = known(monkeypatch, Principal, "principal")
    base, x = chain(), torch.randn(2, 6)
    weights = [linear.weight for linear in base]
    want = base(x)
    model = apply_lora(base, config)
    torch.testing.assert_close(model(x), want)
    assert all(layer.weight is not weight for layer, weight in zip(model, weights, strict=True))
    layer = model[0]
    with layer.disable_adapters():
        assert torch.equal(layer(x), F.linear(x, weights[0], layer.bias))
    layer.add_adapter("other", LoRAConfig(r=2))
    layer.set_adapter("other")
    assert layer.weight is weights[0] and torch.equal(layer(x), F.linear(x, weights[0], layer.bias))
    layer.set_adapter("default")
    layer.merge()
    torch.testing.assert_close(layer.weight, weights[0])
    layer.unmerge()
    with pytest.raises(ValueError, match="'default' has taken its start"):
        layer.add_adapter("third", config)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(chain(), tmp_path)(x), model(x))
    layer.delete_adapter("default")
    assert layer.weight is weights[0]
    remove_lora(model)
    assert all(linear.weight is weight for linear, weight in zip(model, weights, strict=True))
    with pytest.raises(ValueError, match="principal takes its start out of W"):
        LoRALinear.from_linear(QuantizedLinear.from_linear(nn.Linear(6, 6), "int8"), config)


class Scaled(LoRA):
    """A scale for each row, by the call."""

    plain, peft, mergeable = False, False, False

    def lower(self, x=None, call=None) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scaling, call["token_scale"][..., None])


class Residual(LoRA):
    """Each layer's branch also reads what the one before read: by the call and by ``previous``."""

    plain, peft, mergeable, reads_x = False, False, False, True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.before = None if site.previous is None else site.previous.site

    def lower(self, x=None, call=None) -> LowRank:
        call[self.site] = x
        return LowRank(self.lora_A, self.lora_B, x_lora=x if self.before is None else x + call[self.before])


@pytest.mark.parametrize("compiled", [False, True])
def test_side_inputs_reach_the_layers_compiled_or_not(compiled):
    torch._dynamo.reset()
    layer = LoRALinear(IN, OUT, dtype=WIDE, init_lora_weights=False)
    site = Site("", IN, OUT, LoRAConfig(r=R, init_lora_weights=False), dtype=WIDE, tensors={})
    layer.add_adapter("scaled", Scaled(site))
    layer.set_adapter("scaled")
    adapter, x = layer.adapters["scaled"], torch.randn(2, 3, IN, dtype=WIDE)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for scale in torch.randn(3, 2, 3, dtype=WIDE):
        with side_inputs(layer, token_scale=scale):
            y = run(x)
        branch = scale[..., None] * (x @ adapter.lora_A.T @ adapter.lora_B.T) * adapter.scaling
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) + branch)
    with pytest.raises(ValueError, match="call: expected 'token_scale'"):
        layer(x)


def test_layers_pass_on_what_they_read(monkeypatch):
    model = nn.Sequential(nn.ModuleDict({"proj": nn.Linear(6, 6)}), nn.ModuleDict({"proj": nn.Linear(6, 6)}))
    config = known(monkeypatch, Residual, "residual")
    config.init_lora_weights = False
    apply_lora(model, config)
    first, second = (layer for layer in lora_layers(model).values())
    x = torch.randn(2, 6)
    with side_inputs(model):
        h = first(x)
        y = second(h)
    a, b = second.adapters["default"].lora_A, second.adapters["default"].lora_B
    torch.testing.assert_close(y, F.linear(h, second.weight, second.bias) + (h + x) @ a.T @ b.T)
    with pytest.raises(ValueError, match=r"'0\.proj' is passed from layer to layer"):
        first(x)
    with side_inputs(model), pytest.raises(ValueError, match=r"expected '0\.proj'"):
        second(x)


def test_a_checkpoint_computes_again_with_the_same_side_inputs():
    layer = LoRALinear(IN, OUT, dtype=WIDE, init_lora_weights=False)
    site = Site("", IN, OUT, LoRAConfig(r=R, init_lora_weights=False), dtype=WIDE, tensors={})
    layer.add_adapter("scaled", Scaled(site))
    layer.set_adapter("scaled")
    x, scale = torch.randn(2, IN, dtype=WIDE), torch.randn(2, dtype=WIDE)
    layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
        f, *a, use_reentrant=False
    )
    grads = []
    for run in (lambda: layer(x), lambda: layer._gradient_checkpointing_func(layer.forward, x)):
        with side_inputs(layer, token_scale=scale):
            y = run()
        grads.append(torch.autograd.grad(y.square().sum(), layer.adapters["scaled"].lora_A)[0])
    assert torch.equal(*grads)


class Nonlinear(Adapter):
    """y = tanh(x Aᵀ) Bᵀ, which has no weight."""

    plain, mergeable, reads_x = False, False, True

    def build(self, site: Site) -> Start:
        return Start({"a": site.kaiming(R, site.in_features), "b": site.zeros(site.out_features, R)})

    def lower(self, x=None, call=None) -> Added:
        return Added(torch.tanh(self.drop(x) @ self.a.T) @ self.b.T)


def test_what_has_no_weight_says_so_and_sits_on_linears_alone(monkeypatch):
    config = known(monkeypatch, Nonlinear, "nonlinear")
    layer = LoRALinear.from_linear(nn.Linear(IN, OUT), config)
    before = layer.weight
    with pytest.raises(RuntimeError, match="cannot merge: nonlinear has no one weight"):
        layer.merge()
    assert layer.weight is before and not layer.merged
    for other in (nn.Conv1d(3, 4, 1), nn.Embedding(5, 4)):
        model = nn.Sequential(other)
        with pytest.raises(ValueError, match="nonlinear reads its input and sits on linears alone"):
            apply_lora(model, LoRAConfig(r=R, method="nonlinear", target_modules=["0"]))
        assert model[0] is other
