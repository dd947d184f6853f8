"""x by a block-diagonal matrix, beside the dense one."""

import pytest
import torch

from lora_kernels.ops import block_diagonal as module
from lora_kernels.ops.block_diagonal import block_diagonal
from lora_kernels.testing import assert_close

# (n, k): narrow blocks, of which several are joined, or none where n is prime; wide ones.
BLOCKS = [(1, 1), (6, 2), (7, 3), (12, 4), (37, 5), (9, 8), (3, 33), (2, 64)]


def dense(x, blocks):
    return x @ torch.block_diag(*blocks)


def inputs(rows, n, k, dtype=torch.float64):
    torch.manual_seed(n * k)
    shape = rows if isinstance(rows, tuple) else (rows,)
    x, blocks = torch.randn(*shape, n * k, dtype=torch.float64), torch.randn(n, k, k, dtype=torch.float64)
    return [one.to(dtype).requires_grad_() for one in (x, blocks)]


def outcome(function, x, blocks):
    y = function(x, blocks)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return (y.detach(), *torch.autograd.grad(y, (x, blocks), dy))


@pytest.fixture(params=["copied", "in place"])
def order(request, monkeypatch):
    """Whether products are copied to where they belong, or written there, as large ones are."""
    if request.param == "in place":
        monkeypatch.setattr(module, "_LARGE", 0)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), BLOCKS)
@pytest.mark.parametrize("rows", [1, 13, (2, 3)], ids=str)
def test_as_the_dense_matrix(rows, n, k, dtype):
    x, blocks = inputs(rows, n, k, dtype)
    wide = [one.detach().double().requires_grad_() for one in (x, blocks)]
    found, eager, exact = outcome(block_diagonal, x, blocks), outcome(dense, x, blocks), outcome(dense, *wide)
    for name, ours, theirs, right in zip(("y", "dx", "dblocks"), found, eager, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, right, name)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(("n", "k"), BLOCKS)
def test_strided_rows_and_gradients(n, k):
    x, blocks = inputs((4, 2), n, k)
    turned = x.detach().mT.contiguous().mT.requires_grad_()
    found = outcome(lambda x, blocks: block_diagonal(x, blocks.mT.contiguous().mT).mT, turned, blocks)
    for ours, right in zip(found, outcome(lambda *given: dense(*given).mT, x, blocks), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.usefixtures("order")
def test_no_rows():
    x, blocks = inputs((0, 3), 6, 2)
    y, dx, dblocks = outcome(block_diagonal, x, blocks)
    assert y.shape == dx.shape == x.shape and not dblocks.any()


def test_only_what_is_needed_is_computed():
    x, blocks = inputs(5, 6, 2)
    assert torch.autograd.grad(block_diagonal(x.detach(), blocks).sum(), blocks)[0].shape == blocks.shape
    right = torch.autograd.grad(dense(x, blocks.detach()).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(block_diagonal(x, blocks.detach()).sum(), x)[0], right)


def test_transforms_and_compile():
    x, blocks = (one.detach() for one in inputs(5, 6, 2))
    many = torch.stack((blocks, 2 * blocks))
    found = torch.vmap(block_diagonal, in_dims=(None, 0))(x, many)
    torch.testing.assert_close(found, torch.stack([dense(x, one) for one in many]))
    _, tangent = torch.func.jvp(lambda one: block_diagonal(x, one), (blocks,), (blocks,))
    torch.testing.assert_close(tangent, dense(x, blocks))
    compiled = torch.compile(block_diagonal, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, blocks), dense(x, blocks))


def test_bad_input_is_named():
    x, blocks = inputs(5, 6, 2)
    with pytest.raises(ValueError, match=r"blocks: expected \[n, k, k\] with n·k = 12"):
        block_diagonal(x, blocks[:5])
    with pytest.raises(ValueError, match="blocks: expected"):
        block_diagonal(x, blocks[:, :1])
    with pytest.raises(TypeError, match=r"blocks: expected torch\.float64"):
        block_diagonal(x, blocks.float())
