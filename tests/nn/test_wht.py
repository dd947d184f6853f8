"""LBP-WHT against its projection as one explicit matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn import WHTLinear
from lora_kernels.ops.walsh import walsh

WIDE = torch.float64


def basis(order):
    """Rows of the Walsh matrix, from products of square waves, ordered by their sign changes."""
    bits = int(math.log2(order))
    rows = []
    for choice in itertools.product([0, 1], repeat=bits):
        row = [(-1) ** sum(c * ((t >> b) & 1) for b, c in enumerate(choice)) for t in range(order)]
        rows.append(torch.tensor(row, dtype=WIDE))
    return torch.stack(sorted(rows, key=lambda row: int((row[1:] != row[:-1]).sum())))


def mirrored(length, order):
    before = math.ceil((math.ceil(length / order) * order - length) / 2)
    after = math.ceil(length / order) * order - length - before
    one = torch.arange(length, dtype=WIDE)[None, None]
    return F.pad(one, (before, after), mode="reflect")[0, 0].long(), before


def matrices(height, width, order, lowpass):
    """Σ_t m_k[t] x[p, t] as [patches · masks, tokens], and what restores, before the crop's mirror."""
    h = basis(order)
    (down, top), (across, left) = mirrored(height, order), mirrored(width, order)
    project, restore = [], []
    for y0 in range(0, len(down), order):
        for x0 in range(0, len(across), order):
            for r, c in itertools.product(range(order), repeat=2):
                if r + c >= lowpass:
                    continue
                p, q = torch.zeros(height * width, dtype=WIDE), torch.zeros(height * width, dtype=WIDE)
                for i, j in itertools.product(range(order), repeat=2):
                    value = h[r, i] * h[c, j]
                    p[down[y0 + i] * width + across[x0 + j]] += value
                    row, column = y0 + i - top, x0 + j - left
                    if 0 <= row < height and 0 <= column < width:
                        q[row * width + column] += value
                project.append(p)
                restore.append(q)
    return torch.stack(project), torch.stack(restore)


def test_walsh_matrices():
    for order in (1, 2, 4, 8):
        ours = walsh(order).to(WIDE)
        assert torch.equal(ours, basis(order)) and torch.equal(ours, ours.T)
        assert torch.equal(ours @ ours.T, order * torch.eye(order, dtype=WIDE))


@pytest.mark.parametrize("lowpass,masks", [(1, 1), (2, 3), (4, 10), (8, 36), (15, 64)])
def test_count_of_masks(lowpass, masks):
    assert len(WHTLinear(2, 2, (8, 8), 8, lowpass).grid.masks[0]) == masks


@pytest.mark.parametrize("grid,lead", [((4, 8), 0), ((4, 8), 2), ((5, 6), 1), ((7, 3), 0)])
@pytest.mark.parametrize("lowpass", [1, 3, 7])
def test_values_and_gradients(grid, lead, lowpass):
    layer = WHTLinear(3, 5, grid, order=4, lowpass=lowpass, dtype=WIDE)
    tokens = lead + grid[0] * grid[1]
    x, dy = torch.randn(2, tokens, 3, dtype=WIDE, requires_grad=True), torch.randn(2, tokens, 5, dtype=WIDE)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    project, restore = matrices(*grid, 4, lowpass)
    low_x, low_dy = project @ x.detach()[:, lead:], project @ dy[:, lead:] / 16
    want_w = torch.einsum("bpo,bpi->oi", low_dy, low_x)
    want_w += torch.einsum("bto,bti->oi", dy[:, :lead], x.detach()[:, :lead])
    want_x = torch.cat((dy[:, :lead] @ layer.weight, restore.T @ (low_dy @ layer.weight)), 1)
    for one, other in ((dw, want_w), (dx, want_x), (db, dy.sum((0, 1)))):
        torch.testing.assert_close(one, other)
    if lowpass == 7 and grid == (4, 8):
        for one, other in ((dw, torch.einsum("bto,bti->oi", dy, x)), (dx, dy @ layer.weight)):
            torch.testing.assert_close(one, other)


def test_what_is_saved():
    layer, saved = WHTLinear(6, 5, (16, 16)), []
    known = {layer.weight.data_ptr(), layer.basis.data_ptr()}
    x = torch.randn(3, 1 + 256, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x)
    elements = sum(t.untyped_storage().nbytes() // 4 for t in saved if t.data_ptr() not in known)
    assert elements == 3 * 6 * (1 + 256 * 36 // 64)
    layer.weight.requires_grad_(False)
    saved.clear()
    layer(x)
    assert all(t.data_ptr() in known for t in saved)


def test_smooth_fields_lose_little_and_less_with_more_masks():
    t = torch.linspace(0, 3, 16, dtype=WIDE)
    fields = [(torch.sin(a * t[:, None] + b * t) + a).flatten() for a in (0.3, 1.0) for b in (0.2, 0.9)]
    x = torch.stack(fields, 1)[None]
    dy = x.flip(-1).clone()
    errors = []
    for lowpass in (1, 2, 4, 8):
        layer = WHTLinear(4, 4, (16, 16), lowpass=lowpass, dtype=WIDE)
        got = torch.autograd.grad(layer(x), layer.weight, dy)[0]
        want = dy[0].T @ x[0]
        errors.append(float((got - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


def test_shares_the_parameters_and_compiles():
    linear = nn.Linear(3, 4)
    layer = WHTLinear.from_linear(linear, (4, 4), order=4, lowpass=2)
    assert layer.weight is linear.weight and isinstance(layer, nn.Linear)
    x = torch.randn(2, 16, 3)
    want = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer.weight)[0], want)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"grid": (4, 4), "order": 3}, "order: expected a power of two, got 3"),
        ({"grid": (4, 4), "lowpass": 16}, "lowpass: expected 1 to 2 · order - 1 = 15, got 16"),
        ({"grid": 4}, "grid: expected a height and a width, got 4"),
        ({"grid": (8, 3)}, "grid: expected sides that can be mirrored to a multiple of 8, got 3"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        WHTLinear.from_linear(nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match="x: expected at least 8 · 8 tokens"):
        WHTLinear(2, 2, (8, 8))(torch.randn(1, 63, 2))
