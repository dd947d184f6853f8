"""FLoRA's Tucker core, of linears and convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import OUT, WIDE, agrees, linear, refuses, shaken, trained
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.nn import LoRAConv2d

IN = 12


def tucker(adapter):
    """G ×₁ U_1 … ×_N U_N, one mode after the other."""
    whole = adapter.core
    for k in range(whole.dim()):
        whole = torch.tensordot(getattr(adapter, f"U_{k + 1}"), whole, dims=([1], [k])).movedim(0, k)
    return 6 * whole


def test_linear():
    layer = linear("flora_core", ranks=[3, 5])
    assert trained(layer) == 3 * 5 + 12 * 3 + 10 * 5
    x = torch.randn(2, 3, IN, dtype=WIDE)
    agrees(layer, x, lambda one, x: F.linear(x, layer.weight + tucker(one).T, layer.bias))


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)])
def test_convolution(kernel):
    torch.manual_seed(0)
    options = {"ranks": [3, 4, 2, 2]}
    config = {"r": 4, "lora_alpha": 6, "method": "flora_core", "method_options": options}
    layer = shaken(LoRAConv2d(5, 6, kernel, padding=1, dtype=WIDE, **config))
    sizes = (5, 6, *kernel)
    assert trained(layer) == 3 * 4 * 2 * 2 + sum(n * r for n, r in zip(sizes, options["ranks"], strict=True))
    x = torch.randn(2, 5, 7, 7, dtype=WIDE)

    def want(adapter, x):
        return F.conv2d(x, layer.weight + tucker(adapter).transpose(0, 1), layer.bias, padding=1)

    agrees(layer, x, want)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_a_diagonal_core_is_lora():
    layer = linear("flora_core", ranks=[4, 4])
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.core.copy_(torch.eye(4))
    torch.testing.assert_close(adapter.delta(), 6 * adapter.U_2 @ adapter.U_1.T)


def test_draws_anew_on_a_convolution():
    layer = LoRAConv2d(5, 6, 3, r=2, method="flora_core")
    before = layer.adapters["default"].U_1.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.adapters["default"].U_1, before)


def test_bad_ranks():
    options = {"method": "flora_core", "method_options": {"ranks": [3]}}
    refuses("ranks: expected 2, one of at least 1 for each dimension of W", **options)
    refuses("ranks: expected 4", nn.Conv2d(3, 4, 3), **options)
    assert LoRAConfig(method="flora_core").lora_alpha == 8 and OUT == 10
