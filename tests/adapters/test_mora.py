"""MoRA against the dense matrices of its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import shake

from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear

WIDE = torch.float64


def contiguous(length, width):
    """[width, length]: neighbours of a group, the first groups longer by one."""
    size, longer = divmod(length, width)
    matrix, at = torch.zeros(width, length, dtype=WIDE), 0
    for group in range(width):
        count = size + (group < longer)
        matrix[group, at : at + count] = 1
        at += count
    return matrix


def cyclic(length, width, wraps):
    matrix = torch.zeros(width, length, dtype=WIDE)
    for j in range(length + (-length % width if wraps else 0)):
        matrix[j % width, j % length] += 1
    return matrix


def folded(kind, square, sizes):
    width, (n_in, n_out) = len(square), sizes
    fold = cyclic(n_in, width, True) if kind in (1, 4) else contiguous(n_in, width)
    unfold = cyclic(n_out, width, False) if kind in (1, 3) else contiguous(n_out, width)
    return unfold.T @ square @ fold


def turned(square, sizes):
    """Type 6 on the unit vectors, token by token as the definition has it."""
    width, (n_in, n_out) = len(square), sizes
    blocks = math.ceil(n_in / width)
    index = torch.arange(blocks * width) % n_in
    x = torch.eye(n_in, dtype=WIDE)[:, index].view(n_in, blocks, width)
    inverse = 10000.0 ** (-2 * torch.arange(width // 2, dtype=WIDE) / width)
    angles = torch.outer(torch.arange(blocks, dtype=WIDE), torch.cat((inverse, inverse)))
    rotated = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
    flat = ((x * angles.cos() + rotated * angles.sin()) @ square.T).flatten(1)
    return flat.repeat(1, math.ceil(n_out / flat.shape[1]))[:, :n_out].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("sizes,r", [((16, 16), 2), ((12, 10), 4), ((10, 33), 1), ((3, 40), 1), ((40, 3), 1)])
def test_values_and_gradients(kind, sizes, r, bias, poisoned):
    how = {"r": r, "method": "mora", "method_options": {"type": kind}, "bias": bias}
    layer = shake(LoRALinear(*sizes, **how, dtype=WIDE))
    square = layer.adapters["default"].square
    width = int(math.sqrt(sum(sizes) * r) + 0.5)
    assert square.shape == ((width // 2 * 2,) * 2 if kind == 6 else (width, width))
    delta = turned(square, sizes) if kind == 6 else folded(kind, square, sizes)
    x = torch.randn(5, sizes[0], dtype=WIDE, requires_grad=True)
    dy = torch.randn(5, sizes[1], dtype=WIDE)
    y, want = layer(x), F.linear(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(z, (x, square), dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_parameters_and_rank():
    for kind in (1, 6):
        assert make(
            4096, 4096, LoRAConfig(r=8, method="mora", method_options={"type": kind})
        ).square.shape == (
            256,
            256,
        )
    for kind, rank in ((1, 16), (2, 16), (6, 64)):
        config = LoRAConfig(r=2, method="mora", method_options={"type": kind}, init_lora_weights=False)
        delta = make(64, 64, config, dtype=WIDE).delta()
        assert int(torch.linalg.matrix_rank(delta)) == rank
