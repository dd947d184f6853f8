"""Compacter's update against torch.kron."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear, apply_lora

WIDE = torch.float64


@pytest.mark.parametrize("n,rank", [(4, 1), (2, 3), (1, 5)])
def test_values_and_gradients(n, rank):
    options = {"n": n, "rank": rank}
    layer = shake(LoRALinear(24, 16, method="compacter", method_options=options, dtype=WIDE))
    adapter = layer.adapters["default"]
    terms = (torch.kron(adapter.rule[i], adapter.left[i] @ adapter.right[i]) for i in range(n))
    delta = sum(terms).T
    x, dy = torch.randn(5, 24, dtype=WIDE, requires_grad=True), torch.randn(5, 16, dtype=WIDE)
    y, want = layer(x), F.linear(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(y, want)
    wanted = (x, *adapter.parameters())
    for one, other in zip(*(torch.autograd.grad(z, wanted, dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(one, other)
    assert adapter.lower().lora_a.shape[0] == n * n * rank


def test_parameters_and_one_rule_for_all_layers():
    model = nn.Sequential(nn.Linear(768, 24), nn.Linear(24, 768))
    apply_lora(model, LoRAConfig(method="compacter", target_modules="all-linear"))
    first, second = (layer.adapters["default"] for layer in model)
    assert first.rule is second.rule
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (768 + 24) + 4**3
    x = torch.randn(5, 768)
    base = F.linear(F.linear(x, model[0].weight, model[0].bias), model[1].weight, model[1].bias)
    assert 0 < (model(x) - base).abs().max() < 1e-2
    model(x).sum().backward()
    assert first.rule.grad.abs().max() > 0
