"""SMT against the gradient of the whole weight."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear

WIDE = torch.float64
ALL = list(itertools.product(range(3), range(4)))


@pytest.mark.parametrize("blocks", [[(0, 3)], [(2, 1), (0, 1), (1, 0)], ALL])
def test_gradients_are_those_of_full_training_in_the_blocks(blocks):
    base = nn.Linear(16, 12, dtype=WIDE)
    config = LoRAConfig(method="smt", method_options={"block": 4, "blocks": blocks})
    layer = LoRALinear.from_linear(base, config)
    assert sum(p.numel() for p in layer.adapters.parameters()) == 16 * len(blocks)
    x = torch.randn(7, 16, dtype=WIDE, requires_grad=True)
    dy = torch.randn(7, 12, dtype=WIDE)
    full = base.weight.detach().clone().requires_grad_(True)
    dx, dfull = torch.autograd.grad(F.linear(x, full, base.bias), (x, full), dy)
    got_dx, got = torch.autograd.grad(layer(x), (x, layer.adapters["default"].blocks), dy)
    torch.testing.assert_close(got_dx, dx)
    for block, (i, j) in zip(got, blocks, strict=True):
        torch.testing.assert_close(block, dfull[4 * i : 4 * i + 4, 4 * j : 4 * j + 4])


def test_outside_of_the_blocks_nothing_moves():
    config = LoRAConfig(method="smt", method_options={"block": 4, "blocks": [(1, 2)]})
    base = nn.Linear(16, 12)
    layer = shake(LoRALinear.from_linear(base, config))
    moved = layer.merged_weight() != base.weight
    assert moved[4:8, 8:12].all() and moved.sum() == 16
