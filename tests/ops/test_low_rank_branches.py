"""Thin branches beside a linear, of which a part is constant, against autograd over the equation."""

import pytest
import torch
import torch.nn.functional as F
from lora_linear_harness import on

from lora_kernels import _extension
from lora_kernels.ops.branched_linear import branched_linear
from lora_kernels.ops.cored_rank import CoredRank
from lora_kernels.ops.folded_square import FoldedColumns, fold
from lora_kernels.ops.moved_rank import MovedRank
from lora_kernels.testing import assert_close

IN, OUT = 12, 10
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def cored(x, lora_a, core, lora_b):
    return 0.7 * (x @ lora_a.mT @ core.mT @ lora_b.mT)


def moved(x, lora_a, lora_b, a0, b0):
    return x @ lora_a.mT @ lora_b.mT + x @ a0.mT @ b0.mT


def folded(x, columns):
    return fold(x, len(columns)) @ columns


def shapes(kind, r):
    if kind == "folded":
        return [(r, OUT)]
    if kind == "cored":
        return [(r, IN), (r, r), (OUT, r)]
    return [(r, IN), (OUT, r), (r + 3, IN), (OUT, r + 3)]


# The equation, the branch, and the places of the tensors that train.
KINDS = {
    "cored": (cored, CoredRank(OUT, 0.7), (1,)),
    "folded": (folded, FoldedColumns(OUT), (0,)),
    "moved": (moved, MovedRank(OUT), (0, 1)),
}


def run(kind, rows, r, dtype, needs_x, with_weight, path=None):
    """By the equation, or on a path."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64).to(dtype) for s in [(*rows, IN), (OUT, IN), (OUT,)]
    )
    equation, branch, trained = KINDS[kind]
    tensors = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes(kind, r)]
    x.requires_grad_(needs_x)
    for place in trained:
        tensors[place].requires_grad_()
    weight, bias = (weight, bias) if with_weight else (None, None)
    if path is None:
        y = equation(x, *tensors) + (F.linear(x, weight, bias) if with_weight else 0)
    else:
        with on(path):
            y = branched_linear(x, weight, bias, branch, tensors)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype))
    grads = {str(i): t.grad for i, t in enumerate([x, *tensors]) if t.grad is not None}
    return {"y": y.detach()} | grads


@pytest.mark.parametrize("with_weight", [True, False], ids=["W", "alone"])
@pytest.mark.parametrize("needs_x", [True, False], ids=["dX", "no dX"])
@pytest.mark.parametrize("rows, r", [((3, 5), 3), ((1,), 1), ((7,), 16), ((0,), 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["cpp", "cpp-function"])
@pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
def test_y_and_every_gradient(path, kind, dtype, rows, r, needs_x, with_weight):
    given = (rows, r, dtype, needs_x, with_weight)
    found, eager = run(kind, *given, path), run(kind, *given)
    exact = run(kind, rows, r, torch.float64, needs_x, with_weight)
    assert found.keys() == eager.keys()
    for name in found:
        assert_close(found[name], eager[name], exact[name], name, ulps=4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_new_memory_is_filled_whatever_it_held(kind):
    _, branch, _ = KINDS[kind]
    torch.manual_seed(0)
    x, dy, tensors = torch.randn(5, IN), torch.randn(5, OUT), [torch.randn(s) for s in shapes(kind, 3)]
    filled, added = torch.full((5, OUT), torch.nan), torch.zeros(5, OUT)
    saved = branch.add_(filled, x, *tensors, write=True)
    branch.add_(added, x, *tensors)
    torch.testing.assert_close(filled, added)
    filled, added = torch.full((5, IN), torch.nan), torch.zeros(5, IN)
    needs = [True] * len(tensors)
    branch.gradients(dy, filled, needs, *saved, write=True)
    branch.gradients(dy, added, needs, *saved)
    torch.testing.assert_close(filled, added)


@pytest.mark.parametrize("kind", ["cored", "folded"])
@pytest.mark.parametrize("path", ["cpp", "cpp-function"])
@pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
def test_a_second_derivative_is_refused_and_the_first_is_not(path, kind):
    torch.manual_seed(0)
    x, weight = torch.randn(3, IN, requires_grad=True), torch.randn(OUT, IN)
    tensors = [torch.randn(s, requires_grad=True) for s in shapes(kind, 2)]
    with on(path):
        y = branched_linear(x, weight, None, KINDS[kind][1], tensors)
    dy = torch.randn(3, OUT, requires_grad=True)
    once = torch.autograd.grad(y, x, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.equal(dx, *once)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
