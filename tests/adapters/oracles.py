"""A layer against a dense expression in fp64: its values and every gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import IN

from lora_kernels.nn import side_inputs

WIDE = torch.float64


def shape_of_x(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, IN, dtype=WIDE, requires_grad=True)


def agrees(layer, branch, *, x=None, **side):
    """y = x Wᵀ + b + branch(adapter, x), in values and in the gradients of x and all that trains."""
    x = shape_of_x(2, 3) if x is None else x
    adapter = layer.adapters["default"]
    with side_inputs(layer, **side):
        y = layer(x)
    want = F.linear(x, layer.weight, layer.bias) + branch(adapter, x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    dy = torch.randn_like(y)
    same(y, want, leaves, dy)


def same(y, want, leaves, dy):
    """Two outputs of the same leaves, and their gradients."""
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, dy, allow_unused=True)
    for one, other, leaf in zip(ours, theirs, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        one, other = (zero if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def trained(layer) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def saved_shapes(layer, x) -> list[tuple[int, ...]]:
    """The shapes of what autograd saves in a call."""
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        layer(x)
    return shapes
