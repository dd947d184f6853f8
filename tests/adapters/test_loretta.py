"""LoRETTA: trains against einsum, counts, the deviation of the start, and the bottleneck written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.adapters import make
from lora_kernels.nn import LoRALinear, SerialAdapter

IN, OUT, R, RANK = 12, 10, 4, 3
WIDE = torch.float64


def dense_train(cores):
    """G_1 × … × G_d by one einsum a core, over all indices of the tensor."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=([-1], [0]))
    return whole.reshape(-1)


def factors(adapter):
    counts = adapter.lengths
    cores = [
        [getattr(adapter, f"{name}_{k}") for k in range(n)] for name, n in zip("ab", counts, strict=True)
    ]
    lora_a = dense_train(cores[0]).reshape(adapter.in_features, R).T
    return lora_a, dense_train(cores[1]).reshape(R, adapter.out_features).T


def layer_of(method, **options):
    torch.manual_seed(0)
    config = {"r": R, "lora_alpha": 6, "method": method, "method_options": {"tensor_rank": RANK, **options}}
    layer = LoRALinear(IN, OUT, dtype=WIDE, **config)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_()
    return layer


def expected(layer, x, activation):
    adapter = layer.adapters["default"]
    lora_a, lora_b = factors(adapter)
    base = F.linear(x, layer.weight, layer.bias)
    if activation is None:
        return base + adapter.scaling * x @ lora_a.T @ lora_b.T
    h = activation(x @ lora_a.T + adapter.bias_down)
    return base + adapter.scaling * (h @ lora_b.T + adapter.bias_up)


@pytest.mark.parametrize(
    ("method", "options", "activation"),
    [
        ("loretta_rep", {}, None),
        ("loretta_rep", {"shape_a": [4, 3, 4], "shape_b": [8, 5]}, None),
        ("loretta_adp", {}, torch.tanh),
        ("loretta_adp", {"activation": "relu"}, torch.relu),
    ],
)
def test_values_and_every_gradient(method, options, activation):
    layer = layer_of(method, **options)
    x = torch.randn(2, 5, IN, dtype=WIDE, requires_grad=True)
    leaves = [x, *layer.adapters.parameters()]
    y, want = layer(x), expected(layer, x, activation)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-11)
    dy = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_serial_form():
    torch.manual_seed(0)
    serial = SerialAdapter(IN, LoRAConfig(r=R, lora_alpha=R, method="loretta_adp"), dtype=WIDE)
    h = torch.randn(3, IN, dtype=WIDE)
    assert torch.equal(serial(h), h)
    with torch.no_grad():
        for parameter in serial.parameters():
            parameter.normal_()
    lora_a, lora_b = factors(serial.adapter)
    middle = torch.tanh(h @ lora_a.T + serial.adapter.bias_down)
    torch.testing.assert_close(serial(h), h + middle @ lora_b.T + serial.adapter.bias_up)
    with pytest.raises(ValueError, match=r"h: expected last dimension 12, got shape \(3, 5\)"):
        serial(torch.randn(3, 5, dtype=WIDE))


def test_parameters_of_the_released_shapes():
    config = LoRAConfig(r=8, method="loretta_rep")
    adapter = make(768, 768, config)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 580  # 8·5 + 25·8 + 25·12 + 5·8 each


def test_the_released_start_has_its_deviation():
    torch.manual_seed(0)
    config = LoRAConfig(r=8, method="loretta_rep", method_options={"zero_init": False})
    squares = [
        [float(f.detach().square().mean()) for f in make(64, 96, config).contracted()] for _ in range(200)
    ]
    for found, side in zip(zip(*squares, strict=True), (64, 96), strict=True):
        assert abs(math.sqrt(sum(found) / len(found) * (side + 8)) - 1) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape_a": [4, 4]}, r"shape_a: expected whole numbers of product 12 · 4, got \(4, 4\)"),
        ({"tensor_rank": 0}, "tensor_rank: expected at least 1, got 0"),
        ({"zero_init": "no"}, "zero_init: expected one of"),
    ],
)
def test_bad_options_leave_the_model_alone(options, message):
    model = nn.Sequential(nn.Linear(IN, OUT))
    config = LoRAConfig(r=R, method="loretta_rep", target_modules=["0"], method_options=options)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, config)
    assert type(model[0]) is nn.Linear
