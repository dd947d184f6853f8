"""LORS: stacks that share a weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn.methods.lors import LORSLinear, LORSMixing

IN, OUT, R, WIDE = 6, 5, 2, torch.float64


def shake(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_static_values_gradients_and_count():
    torch.manual_seed(0)
    shared = nn.Linear(IN, OUT, dtype=WIDE)
    stack = LORSLinear.stack(shared, 3, R, [1, 2, 1])
    assert all(layer.weight is shared.weight for layer in stack)
    x = torch.randn(4, IN, dtype=WIDE, requires_grad=True)
    assert all(torch.equal(layer(x), shared(x)) for layer in stack)
    want = IN * OUT + sum(k * R * (IN + OUT) + OUT for k in (1, 2, 1))
    assert sum(p.numel() for p in stack.parameters()) == want
    shake(stack)
    dy = torch.randn(3, 4, OUT, dtype=WIDE)
    y = torch.stack([layer(x) for layer in stack])
    rows = []
    for layer, k in zip(stack, (1, 2, 1), strict=True):
        spans = [slice(i * R, (i + 1) * R) for i in range(k)]
        delta = sum(layer.lora_B[:, span] @ layer.lora_A[span] for span in spans)
        rows.append(F.linear(x, layer.weight + delta, layer.bias))
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    leaves = [x, *stack.parameters()]
    for one, other in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, other)
    whole = torch.autograd.grad((torch.stack([layer(x) for layer in stack]) * dy).sum(), shared.weight)[0]
    parts = [
        torch.autograd.grad((layer(x) * g).sum(), shared.weight)[0]
        for layer, g in zip(stack, dy, strict=True)
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_adaptive_mixing_is_the_dense_one():
    torch.manual_seed(0)
    queries, rows, columns, points = 4, 5, 3, 7
    stack = LORSMixing.stack(queries, rows, columns, 2, R, [1, 3]).double()
    x, q = torch.randn(2, 8, points, rows, dtype=WIDE), torch.randn(2, 8, queries, dtype=WIDE)
    start = stack[0].shared.bias.view(rows, columns)
    for layer in stack:
        torch.testing.assert_close(layer(x, q), x @ start)
    shake(stack)
    for layer, k in zip(stack, (1, 3), strict=True):
        whole = layer.shared(q).view(2, 8, rows, columns)
        cores = layer.cores(q).view(2, 8, k, R, R)
        for i in range(k):
            left, right = layer.left[i * R : (i + 1) * R].T, layer.right[i * R : (i + 1) * R]
            whole = whole + left @ cores[:, :, i] @ right
        torch.testing.assert_close(layer(x, q), x @ whole)
    assert stack[0].shared is stack[1].shared


def test_what_they_refuse():
    with pytest.raises(ValueError, match="r: expected at least 1, got 0"):
        LORSLinear(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="k: expected 3 numbers, one a layer, got 2"):
        LORSLinear.stack(nn.Linear(2, 2), 3, 1, [1, 1])
    with pytest.raises(ValueError, match="rows: expected a divisor of the shared linear's 7 outputs, got 2"):
        LORSMixing(nn.Linear(2, 7), 2)
