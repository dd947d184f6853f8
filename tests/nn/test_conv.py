"""LoRAConv1d, 2d and 3d: the layers, merging, DoRA, layouts, on models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRAConv1d, LoRAConv2d, LoRAConv3d, apply_lora, lora_layers, remove_lora

LAYERS = {1: LoRAConv1d, 2: LoRAConv2d, 3: LoRAConv3d}
IN, OUT, RANK, SIZE = 3, 5, 2, 6
SETTINGS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
]


def new_layer(dims, method="lora", dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = LAYERS[dims](IN, OUT, r=RANK, lora_alpha=3, method=method, dtype=dtype, **options)
    return shake(layer)


def shake(layer):
    with torch.no_grad():
        for adapter in layer.adapters.values():
            for parameter in adapter.parameters():
                parameter.normal_()
    return layer


def data(dims, dtype=torch.float64, channels_last=False):
    x = torch.randn(2, IN, *[SIZE] * dims, dtype=dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def dense(layer, x):
    weight = layer.weight.flatten(1)
    for name in layer.active:
        weight = layer.adapters[name].merged(weight, layer.weight.flatten(1))
    return layer._conv_forward(x, weight.view_as(layer.weight), layer.bias)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "sora"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_dense_layer(dims, settings, method, channels_last):
    layer = new_layer(dims, method, **settings)
    x = data(dims, channels_last=channels_last).requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y, want = layer(x), dense(layer, x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_pefts_function(method, channels_last):
    """W = 1 by channel, so that the mask can be read off."""
    layer = new_layer(2, method, kernel_size=1, lora_dropout=0.4, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.ones_like(layer.weight))
    x = torch.zeros(2, IN, SIZE, SIZE, dtype=torch.float64)
    x[:, 0] = 1 + torch.rand(2, SIZE, SIZE, dtype=torch.float64)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    change = dense(layer.eval(), x) - layer._conv_forward(x, layer.weight, layer.bias)
    got = layer.train()(x) - layer._conv_forward(x, layer.weight, layer.bias)
    kept = got.abs().amax(1) > 1e-12
    assert 0.3 < kept.double().mean() < 0.9
    torch.testing.assert_close(got, change * kept[:, None] / 0.6)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_merge_and_unmerge(dims, method):
    layer = new_layer(dims, method, dtype=torch.float32, kernel_size=3)
    x = data(dims, torch.float32)
    weight, before, y = layer.weight, layer.weight.clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    with layer.disable_adapters():
        assert torch.equal(layer(x), layer._conv_forward(x, before, layer.bias))
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight, before) and torch.equal(layer(x), y)


def test_two_adapters_an_unbatched_input_and_half_precision():
    layer = new_layer(2, "dora", kernel_size=3)
    layer.add_adapter("second", LoRAConfig(r=4))
    layer.set_adapter(["default", "second"])
    shake(layer)
    x = data(2)
    torch.testing.assert_close(layer(x), dense(layer, x))
    torch.testing.assert_close(layer(x[0]), dense(layer, x)[0])
    half = new_layer(2, kernel_size=3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.adapters.parameters()} == {torch.float32}
    half(data(2, torch.bfloat16)).float().sum().backward()
    assert half.adapters["default"].lora_A.grad.dtype == torch.float32


def test_starts_at_the_base_and_state_dict():
    torch.manual_seed(0)
    base = nn.Conv2d(IN, OUT, 3)
    layer = LoRAConv2d.from_conv(base, r=RANK, use_dora=True)
    x = data(2, torch.float32)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    shake(layer)
    other = LoRAConv2d(IN, OUT, 3, r=RANK, method="dora")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    plain = layer.to_base(merge=True)
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)


def test_in_a_model_and_what_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(IN, 4, 3), nn.Conv1d(4, 4, 3, groups=2))
    original, x = copy.deepcopy(model), data(1, torch.float32)
    apply_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    assert [type(layer) for layer in lora_layers(model).values()] == [LoRAConv1d]
    assert torch.equal(model(x), original(x))
    with pytest.raises(ValueError, match="groups: expected 1"):
        apply_lora(remove_lora(model), LoRAConfig(r=2, target_modules=["1"]))
    with pytest.raises(TypeError, match=r"conv2d: expected an nn\.Conv2d, got Conv1d"):
        LoRAConv2d.from_conv(nn.Conv1d(1, 1, 1))
    with pytest.raises(RuntimeError, match="expected"):
        model(torch.randn(2, IN + 1, SIZE))
    assert F.conv1d(x, model[0].weight, model[0].bias).shape == model[0](x).shape
