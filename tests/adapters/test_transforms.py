"""Every structure under ``torch.func`` and forward-mode differentiation: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, vmap

from lora_kernels import LoRAConfig, apply_lora, methods
from lora_kernels.nn import side_inputs
from lora_kernels.testing.method_cases import CASES, IN, OUT, RANK, MethodCase

# Sums by groups of rows, which no transform sees through.
REFUSED = {"mixlora", "sira", "moa", "saml", "arrow"}
# Of factors that a network makes for each layer, whose names a single layer lacks.
APART = {"vlora"}
KEYS = [key for key in methods.structures() if key not in APART]


def layer(key):
    """A call of a layer's parameters and x, those parameters, and a tangent of each."""
    torch.manual_seed(0)
    case, model = CASES.get(key, MethodCase()), nn.Sequential(nn.Linear(IN, OUT))
    options = {"r": RANK, "target_modules": ["0"], "method": key, "init_lora_weights": False} | case.options
    apply_lora(model, LoRAConfig(**options)).double().eval()
    given = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not given:
        pytest.skip("nothing trains")
    x = torch.randn(3, 5, IN, dtype=torch.float64)

    def call(parameters):
        with side_inputs(model, **case.side(x)):
            return functional_call(model, parameters, (x,))

    return call, given, {name: torch.randn_like(p) for name, p in given.items()}


@pytest.mark.parametrize("key", KEYS)
def test_forward_mode(key):
    call, given, tangents = layer(key)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, tangents[name]) for name, p in given.items()}
        if key in REFUSED:
            with pytest.raises(NotImplementedError, match=r"multi_lora_.*forward-mode"):
                call(dual)
            return
        tangent = forward_ad.unpack_dual(call(dual).square().sum()).tangent
    slopes = grad(lambda parameters: call(parameters).square().sum())(given)
    want = sum((slopes[name] * tangents[name]).sum() for name in given)
    torch.testing.assert_close(tangent, want)


WITHOUT_SIDES = [key for key in KEYS if not CASES.get(key, MethodCase()).side(torch.ones(1, IN))]


@pytest.mark.parametrize("key", WITHOUT_SIDES)
def test_vmap_over_the_adapters(key):
    call, given, tangents = layer(key)
    moved = {name: p + 0.1 * tangents[name] for name, p in given.items()}
    stacked = {name: torch.stack([p, moved[name]]) for name, p in given.items()}
    if key in REFUSED:
        with pytest.raises(NotImplementedError, match=r"multi_lora_.*torch\.func"):
            vmap(call)(stacked)
        return
    torch.testing.assert_close(vmap(call)(stacked), torch.stack([call(given), call(moved)]))
