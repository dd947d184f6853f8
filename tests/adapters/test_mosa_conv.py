"""loralib's convolution: which number of B A is which of ΔW, and the count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dense_oracle import WIDE, agrees, linear, refuses, shaken, trained
from torch import nn

from lora_kernels.nn import LoRAConv2d

IN, OUT, K, R = 3, 4, 3, 2


def change(adapter):
    """ΔW, number by number."""
    product = adapter.kernel_B @ adapter.kernel_A
    places = torch.empty(OUT, IN, K, K, dtype=torch.long)
    for o in range(OUT):
        for a in range(K):
            for i in range(IN):
                for b in range(K):
                    row, column = o * K + a, i * K + b
                    at = a * IN + i
                    places[o, at // K, at % K, b] = row * IN * K + column
    return adapter.lora_alpha / adapter.r * product.flatten()[places]


def layer_of(**given):
    torch.manual_seed(0)
    return shaken(
        LoRAConv2d(IN, OUT, K, r=R, lora_alpha=3, method="mosa_conv", padding=1, dtype=WIDE, **given)
    )


def test_values_gradients_and_merge():
    layer = layer_of()
    assert trained(layer) == R * K * (IN * K + OUT * K)
    x = torch.randn(2, IN, 5, 5, dtype=WIDE)
    agrees(layer, x, lambda one, x: F.conv2d(x, layer.weight + change(one), layer.bias, padding=1))
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_dropout_is_on_the_branch_alone():
    layer = layer_of(lora_dropout=0.5)
    x = torch.randn(2, IN, 5, 5, dtype=WIDE)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    base = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(y, base + F.conv2d(dropped, change(layer.adapters["default"]), padding=1))


def test_on_a_linear_it_is_lora():
    layer = linear("mosa_conv")
    one = layer.adapters["default"]
    torch.testing.assert_close(one.delta(), 6 / 4 * one.kernel_B @ one.kernel_A)


def test_kernels_that_are_not_square():
    refuses(r"expects a square kernel, got \(2, 3\)", nn.Conv2d(3, 4, (2, 3)), method="mosa_conv")
    refuses(r"expects a square kernel, got \(3,\)", nn.Conv1d(3, 4, 3), method="mosa_conv")
