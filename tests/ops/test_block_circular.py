"""Circular blocks beside a linear, against the dense matrix of them."""

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.ops.block_circular import BlockCircular
from lora_kernels.ops.branched_linear import branched_linear
from lora_kernels.testing import assert_close

SCALING = 0.7


def dense(kernel):
    """[out, in]: row i of a block is its kernel turned by i."""
    turned = torch.stack([kernel.roll(i, -1) for i in range(kernel.shape[-1])], 1)  # [m, i, n, j]
    return SCALING * turned.flatten(2).flatten(0, 1)


def run(rows, blocks, dtype, needs_x, eager=False):
    out, into, size = blocks
    torch.manual_seed(0)
    shapes = [(*rows, into * size), (out * size, into * size), (out * size,), (out, into, size)]
    x, weight, bias, kernel = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
    x.requires_grad_(needs_x)
    kernel.requires_grad_()
    if eager:
        y = F.linear(x, weight, bias) + F.linear(x, dense(kernel))
    else:
        y = branched_linear(x, weight, bias, BlockCircular(out * size, SCALING), [kernel])
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape).to(dtype))
    return {"y": y.detach(), "kernel": kernel.grad} | ({"x": x.grad} if needs_x else {})


def test_the_dense_matrix_is_circular():
    kernel = torch.arange(6.0).view(1, 2, 3)
    want = [[0, 1, 2, 3, 4, 5], [2, 0, 1, 5, 3, 4], [1, 2, 0, 4, 5, 3]]
    torch.testing.assert_close(dense(kernel), SCALING * torch.tensor(want, dtype=torch.float32))


@pytest.mark.parametrize("needs_x", [True, False], ids=["dX", "no dX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(3, 5), (1,), (0,)], ids=str)
@pytest.mark.parametrize("blocks", [(1, 1, 8), (2, 3, 4), (3, 2, 5), (4, 1, 1)], ids=str)
def test_y_and_every_gradient(blocks, rows, dtype, needs_x):
    found, eager = (run(rows, blocks, dtype, needs_x, eager) for eager in (False, True))
    exact = run(rows, blocks, torch.float64, needs_x, True)
    assert found.keys() == eager.keys()
    for name in found:
        assert found[name].dtype == dtype
        assert_close(found[name], eager[name], exact[name], name, ulps=8.0)
