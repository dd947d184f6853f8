"""What torch does to any module, done to every structure: the same output, or a refusal by name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from cases import IN, new_layer, run, shake
from torch import nn
from torch.nn.utils import prune

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.adapters import METHODS
from lora_kernels.nn import LoRALinear, WHTLinear

every_method = pytest.mark.parametrize("method", sorted(METHODS))
# Relative error of a layer that was cast. In bfloat16 another vector may be among a sub-vector's best.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
APART = {("vblora", torch.bfloat16): 0.5}


def saved_whole(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(layer):
    """A copy without its values."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for one in other.parameters():
            one.zero_()
    return other


def assigned(layer):
    other = emptied(layer)
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def by_meta(layer):
    other = copy.deepcopy(layer).to("meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def by_to_empty(layer):
    other = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    return other


def factors_parametrised(layer):
    for adapter in layer.adapters.values():
        for name in list(adapter._parameters):
            if not hasattr(nn.ModuleDict, name):  # torch's own limit
                parametrize.register_parametrization(adapter, name, nn.Identity())
    return layer


def factors_pruned(layer):
    for adapter in layer.adapters.values():
        for name in list(adapter._parameters):
            prune.identity(adapter, name)
    return layer


VERBS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_whole,
    "share_memory": lambda layer: layer.share_memory(),
    "assign": assigned,
    "meta": by_meta,
    "to_empty": by_to_empty,
    "parametrize": factors_parametrised,
    "prune": factors_pruned,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@every_method
def test_the_output_stays_and_all_that_trains_learns(method, verb):
    layer = shake(new_layer(method)).eval()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    want = run(layer, x, method).detach()
    made = verb(layer)
    y = run(made, x, method)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert all(one.grad is not None for one in made.parameters() if one.requires_grad)


@pytest.mark.parametrize("dtype", BOUNDS)
@every_method
def test_a_cast_costs_roundings_and_no_more(method, dtype):
    layer = shake(new_layer(method)).eval()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    want = run(layer, x, method).detach()
    y = run(layer.to(dtype), x.to(dtype), method)
    assert y.dtype == dtype and {one.dtype for one in layer.parameters()} == {dtype}
    assert (y.double() - want).norm() <= APART.get((method, dtype), BOUNDS[dtype]) * want.norm()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "parametrize": lambda layer: parametrize.register_parametrization(
        layer, "weight", Doubled(), unsafe=True
    ),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("how", COMPUTED.values(), ids=COMPUTED)
@every_method
def test_a_base_weight_that_something_computes_is_refused_by_name(method, how):
    layer = new_layer(method)
    how(layer)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    for refused in (lambda: run(layer, x, method), layer.merge, layer.merged_weight):
        with pytest.raises(RuntimeError, match="weight: expected a parameter of the layer, got one"):
            refused()


@pytest.mark.parametrize("how", COMPUTED.values(), ids=COMPUTED)
def test_a_linear_whose_weight_something_computes_gets_no_adapter(how):
    model = nn.Sequential(nn.Linear(4, 4))
    how(model[0])
    with pytest.raises(ValueError, match=r"target_modules: '0' (is of type|cannot be adapted)"):
        apply_lora(model, LoRAConfig(r=2, target_modules=["0"]))


def test_a_bias_may_be_computed():
    layer = LoRALinear(4, 4, init_lora_weights=False)
    x = torch.randn(3, 4)
    want = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Doubled(), unsafe=True)
    torch.testing.assert_close(layer(x), want)


def test_a_basis_goes_through_meta_and_to_empty():
    layer = WHTLinear(8, 4, (8, 8))
    x = torch.randn(2, 64, 8, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).sin().sum(), x)
    for made in (by_meta(layer), by_to_empty(layer)):
        (got,) = torch.autograd.grad(made(x).sin().sum(), x)
        torch.testing.assert_close(got, want)


def on_another_base(layer):
    """A layer of other numbers, whose start took something else out of them."""
    torch.manual_seed(7)
    other = LoRALinear(12, 10, r=2, init_lora_weights="pissa")
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("verb", [by_meta, by_to_empty, on_another_base])
def test_a_base_that_a_start_took_from_follows_what_is_loaded(verb, active):
    torch.manual_seed(0)
    layer = LoRALinear(12, 10, r=2, init_lora_weights="pissa")
    x = torch.randn(3, 12)
    if not active and verb is on_another_base:
        pytest.skip("a state dict says what acts by the layer that it is loaded into")
    layer.set_adapter(["default"] if active else [])
    made = verb(layer)
    torch.testing.assert_close(made(x), layer(x))
    with layer.disable_adapters(), made.disable_adapters():
        torch.testing.assert_close(made(x), layer(x))
    made.set_adapter("default")
    layer.set_adapter("default")
    torch.testing.assert_close(made(x), layer(x))


def test_the_base_stays_bit_for_bit_where_the_same_is_loaded():
    layer = LoRALinear(12, 10, r=2, init_lora_weights="pissa")
    before = layer.bare_weight
    layer.load_state_dict(layer.state_dict())
    assert layer.bare_weight is before
