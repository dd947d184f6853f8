"""LoFiT: both stages written out, the choice of heads, and the linear that either folds into."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import IN, WIDE, agrees, linear, refuses, trained
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import QuantizedLinear, lofit_heads, lora_layers

HEADS = 3


def folds(layer):
    x = torch.randn(4, IN, dtype=WIDE)
    weight, bias = layer.adapters["default"].folded(layer.weight, layer.bias)
    torch.testing.assert_close(F.linear(x, weight, bias), layer(x))


def test_scales():
    layer = linear("lofit", stage="scale", heads=HEADS)
    assert trained(layer) == IN
    x = torch.randn(2, 5, IN, dtype=WIDE)
    agrees(layer, x, lambda one, x: F.linear(x * (1 + one.scale), layer.weight, layer.bias))
    folds(layer)


def test_offsets():
    layer = linear("lofit", heads=HEADS, chosen={"": [2, 0]})
    assert trained(layer) == 2 * IN // HEADS

    def want(one, x):
        v = torch.cat([one.offset[1], torch.zeros(IN // HEADS, dtype=WIDE), one.offset[0]])
        return F.linear(x + v, layer.weight, layer.bias)

    agrees(layer, torch.randn(2, 5, IN, dtype=WIDE), want)
    folds(layer)


def test_beside_other_adapters_the_base_alone_reads_it():
    layer = linear("lofit", heads=HEADS, stage="scale")
    layer.add_adapter("lora", LoRAConfig(r=2, init_lora_weights=False))
    layer.set_adapter(["lora", "default"])
    one, lora = layer.adapters["default"], layer.adapters["lora"]
    x = torch.randn(2, IN, dtype=WIDE)
    want = F.linear(x * (1 + one.scale), layer.weight, layer.bias) + x @ lora.delta().T
    torch.testing.assert_close(layer(x), want)


def test_the_two_stages_on_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(3)))
    first = LoRAConfig(
        method="lofit", target_modules="all-linear", method_options={"stage": "scale", "heads": HEADS}
    )
    apply_lora(model, first)
    for at, (name, layer) in enumerate(lora_layers(model).items()):
        with torch.no_grad():
            layer.adapters["default"].scale.view(HEADS, -1)[at] = 5.0 + at
        assert name == str(at)
    chosen = lofit_heads(model, 2)
    assert chosen == {"2": [2], "1": [1]}
    options = {"heads": HEADS, "chosen": chosen}
    apply_lora(
        model, LoRAConfig(method="lofit", target_modules=list(chosen), method_options=options), "offsets"
    )
    added = [p.numel() for layer in lora_layers(model).values() for p in layer.adapters.parameters()]
    assert sorted(added) == [IN // HEADS] * 2 + [IN] * 3
    with pytest.raises(ValueError, match="count: expected 1 to 9 heads, got 10"):
        lofit_heads(model, 10)
    with pytest.raises(ValueError, match="model: expected lofit adapters 'offsets' of the stage 'scale'"):
        lofit_heads(model, 1, "offsets")


def test_over_a_quantised_base():
    base = QuantizedLinear.from_linear(nn.Linear(IN, 10), "int8")
    model = nn.Sequential(base)
    apply_lora(model, LoRAConfig(method="lofit", target_modules=["0"], method_options={"stage": "scale"}))
    x = torch.randn(3, IN)
    torch.testing.assert_close(model(x), base(x * (1 + model[0].adapters["default"].scale)))


def test_bad_options():
    for options, message in (
        ({"heads": 5}, "heads: lofit expects a divisor of in_features = 12, got 5"),
        ({"stage": "both"}, "stage: expected one of"),
        ({"heads": 3, "chosen": {"0": [3]}}, r"chosen: expected some of 3 heads for '0', got \[3\]"),
        ({"heads": 3, "chosen": {"1": [0]}}, r"chosen: expected some of 3 heads for '0', got \[\]"),
        ({"chosen": [0]}, "chosen: expected layers and their heads, got list"),
    ):
        refuses(message, method="lofit", method_options=options)
