"""What the structures that are not of low rank promise together: memory, and errors that change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import new_layer, shake
from torch import nn
from watched import Made, SavedTensors

from lora_kernels.adapters import METHODS, LoRAConfig
from lora_kernels.nn import LoRALinear, apply_lora, quantize_base

ROWS, IN, OUT = 4, 48, 40
BLOCKS = [(0, 1), (3, 1), (4, 5)]
SMT = {"block": 8, "blocks": BLOCKS}
# Options, and what the branch may save of x: elements a row.
KEPT = {
    "mora": [({"type": kind}, 8 if kind == 6 else 9) for kind in (1, 2, 3, 4)] + [({"type": 6}, IN)],
    "quanta": [({}, IN), ({"dims": (10, 3, 2)}, IN)],
    "fourierft": [({"n_frequency": n}, 2 * (IN // 2 + 1)) for n in (1, 100, 200)],
    "compacter": [({}, IN + 16)],  # A trains, so that x is kept as by LoRA
    "smt": [(SMT, 16)],
    "neft": [({"columns": [40, 3, 9]}, 3), ({"rows": [1, 2]}, IN)],
}
MADE = [(method, options) for method in KEPT for options, _ in KEPT[method]]
SAVED = [(method, options, kept) for method in KEPT for options, kept in KEPT[method]]


def layer_of(method, options, **given):
    return LoRALinear(IN, OUT, r=1, method=method, method_options=options, **given)


@pytest.mark.parametrize("method,options", MADE)
def test_nothing_of_the_size_of_the_weight_is_made(method, options):
    layer = shake(layer_of(method, options))
    x = torch.randn(ROWS, IN, requires_grad=True)
    with Made(*layer.parameters()) as made:
        layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())
    assert 0 < made.largest < IN * OUT


def test_the_watch_sees_a_weight_that_is_made():
    layer = shake(layer_of("mora", {}))
    with Made(*layer.parameters()) as made:
        F.linear(torch.randn(ROWS, IN), layer.weight + layer.adapters["default"].delta())
    assert made.largest >= IN * OUT


@pytest.mark.parametrize("method,options,kept", SAVED)
def test_what_is_saved_of_x(method, options, kept):
    """At 1000 rows the parameters do not show; five hundredths are for what is of no rows."""
    rows = 1000
    layer = shake(layer_of(method, options))
    x = torch.randn(rows, IN)
    with SavedTensors() as saved:
        layer(x)
    assert saved.elements(*layer.parameters()) <= 1.05 * rows * kept


@pytest.mark.parametrize("method", sorted(KEPT))
def test_dropout_is_the_branchs_alone(method):
    options = KEPT[method][-1][0]
    layer = shake(layer_of(method, options, lora_dropout=0.5))
    x = torch.randn(ROWS, IN, requires_grad=True)
    base = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    y = layer(x)
    layer.eval()
    delta = layer(x) - base
    assert not torch.allclose(y - base, delta)
    layer.train()
    scale = (layer(torch.zeros_like(x)) - layer.bias).abs().max()
    assert scale < 1e-6
    grad = torch.autograd.grad(y.sum(), x)[0]
    free = torch.autograd.grad(base.sum(), x)[0]
    assert not torch.allclose(grad, free)


@pytest.mark.parametrize("method", ["mora", "fourierft", "smt", "neft"])
def test_a_base_that_trains_gets_its_gradient(method):
    layer = shake(new_layer(method))
    layer.weight.requires_grad_(True)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    dy = torch.randn(3, layer.out_features, dtype=torch.float64)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad, dy.T @ x)


@pytest.mark.parametrize("method", ["mora", "quanta", "fourierft", "smt", "neft"])
def test_under_autocast_and_transforms(method):
    layer = shake(new_layer(method, dtype=torch.float64))
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}

    def loss(given):
        return torch.func.functional_call(layer, given, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for one, other in zip(got.values(), want, strict=True):
        torch.testing.assert_close(one, other)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.3)


BAD = [
    ("mora", {"type": 5}, r"method_options: type: expected one of \(1, 2, 3, 4, 6\), got 5"),
    ("quanta", {"dims": (3, 3)}, r"dims: quanta expects .* in_features = 48 or more, got \(3, 3\)"),
    ("quanta", {"dims": 48}, "dims: quanta expects .* got 48"),
    ("fourierft", {"n_frequency": 0}, "method_options: n_frequency: expected at least 1, got 0"),
    ("fourierft", {"n_frequency": 1921}, "n_frequency: fourierft expects at most in · out = 1920, got 1921"),
    ("compacter", {"n": 7}, "n: compacter expects a divisor of in_features = 48, got 7"),
    ("compacter", {"rank": 0}, "method_options: rank: expected at least 1, got 0"),
    ("smt", {"block": 7}, "block: smt expects a divisor of in_features = 48, got 7"),
    ("smt", {"block": 8}, "blocks: smt expects different pairs within 5 by 6 for '0', got None"),
    ("smt", {"block": 8, "blocks": [(5, 0)]}, "blocks: smt expects"),
    ("smt", {"block": 8, "blocks": [(1, 0), (1, 0)]}, "blocks: smt expects"),
    ("smt", {"block": 8, "blocks": {"1": [(1, 0)]}}, "for '0', got None"),
    ("smt", {"block": 8, "blocks": 3}, "blocks: smt expects .* got 3"),
    ("neft", {}, "rows: neft expects rows or columns for '0'"),
    ("neft", {"rows": [1], "columns": [1]}, "rows: neft expects rows or columns"),
    ("neft", {"rows": [40]}, "rows: neft expects different numbers below 40"),
    ("neft", {"columns": [1, 1]}, "columns: neft expects different numbers below 48"),
    ("neft", {"columns": 1}, "columns: neft expects a list"),
]


@pytest.mark.parametrize("method,options,words", BAD)
def test_bad_options_are_named_and_change_nothing(method, options, words):
    model = nn.Sequential(nn.Linear(IN, OUT))
    before = model[0], {name: p.requires_grad for name, p in model.named_parameters()}
    config = LoRAConfig(r=1, method=method, method_options=options, target_modules=["0"])
    with pytest.raises(ValueError, match=words):
        apply_lora(model, config)
    assert model[0] is before[0] and before[1] == {n: p.requires_grad for n, p in model.named_parameters()}


def test_other_bases_are_refused_by_name():
    for method in ("mora", "quanta", "fourierft", "smt", "neft"):
        options = KEPT[method][-1][0]
        config = LoRAConfig(r=1, method=method, method_options=options, target_modules=["0"])
        with pytest.raises(ValueError, match=f"method: {method} reads its input and sits on linears alone"):
            apply_lora(nn.Sequential(nn.Conv1d(IN, OUT, 1)), config)
    quantised = quantize_base(nn.Sequential(nn.Linear(IN, OUT)), "int8")
    with pytest.raises(ValueError, match="quanta needs a dense base"):
        apply_lora(quantised, LoRAConfig(r=1, method="quanta", target_modules=["0"]))


def test_none_is_mixed_in_a_batch():
    assert not any(METHODS[method].plain for method in KEPT if method != "compacter")
