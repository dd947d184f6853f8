"""Two bases with a diagonal and a sparse matrix between, against autograd over the dense matrix."""

import pytest
import torch

from lora_kernels.ops.sparse_core import places, sparse_core
from lora_kernels.testing import assert_close

IN, OUT, N = 10, 7, 6


def made(dtype, lead=(3, 5), count=9):
    torch.manual_seed(0)
    shapes = ((*lead, IN), (IN, N), (OUT, N), (N,), (count,))
    x, right, left, diagonal, values = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
    flat = torch.randperm(N * N)[:count]
    indices = torch.stack([flat // N, flat % N])
    for trained in (x, diagonal, values):
        trained.requires_grad_()
    return [x, right, left, diagonal, values], indices


def dense(x, right, left, diagonal, values, indices):
    core = torch.diag(diagonal).index_put(tuple(indices), values, accumulate=True)
    return x @ right @ core.T @ left.T


def ours(*tensors):
    return sparse_core(*tensors[:-1], places(tensors[-1], N))


def run(function, given):
    tensors, indices = given
    y = function(*tensors, indices)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    trained = [t for t in tensors if t.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), trained)]


@pytest.mark.parametrize("count", [0, 1, 9, N * N])
@pytest.mark.parametrize("lead", [(3, 5), (4,), (), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_y_and_every_gradient(dtype, lead, count):
    found, eager = (run(function, made(dtype, lead, count)) for function in (ours, dense))
    exact = run(dense, made(torch.float64, lead, count))
    for at, each in enumerate(zip(found, eager, exact, strict=True)):
        assert_close(*each, f"result {at}", ulps=4.0)


@pytest.mark.parametrize("needs", [{0}, {3}, {4}, {0, 4}], ids=str)
def test_gradients_that_nobody_asks_for(needs):
    (tensors, indices) = made(torch.float64)
    for at in (0, 3, 4):
        tensors[at].requires_grad_(at in needs)
    torch.testing.assert_close(run(ours, (tensors, indices)), run(dense, (tensors, indices)))


def test_gradcheck_transforms_and_compile():
    tensors, indices = made(torch.float64, (2,), 5)
    where = places(indices, N)
    x, right, left, diagonal, values = tensors
    assert torch.autograd.gradcheck(
        lambda *t: sparse_core(t[0], right, left, *t[1:], where), (x, diagonal, values)
    )
    wanted = sparse_core(*tensors, where)
    vmapped = torch.vmap(lambda row: sparse_core(row, *tensors[1:], where))(x)
    torch.testing.assert_close(vmapped, wanted)
    compiled = torch.compile(lambda *t: sparse_core(*t, where), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), wanted)


def test_no_square_is_made():
    n, shapes = 64, []
    flat = torch.randperm(n * n)[:20]
    where = places(torch.stack([flat // n, flat % n]), n)
    x = torch.randn(3, IN, requires_grad=True)
    values = torch.randn(20, requires_grad=True)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in [out] if isinstance(t, torch.Tensor) and t.layout == torch.strided)
            return out

    with Sizes():
        sparse_core(x, torch.randn(IN, n), torch.randn(OUT, n), torch.ones(n), values, where).sum().backward()
    assert shapes and (n, n) not in shapes


@pytest.mark.parametrize(("name", "at"), [("right", 1), ("left", 2), ("diagonal", 3), ("values", 4)])
def test_sizes_that_do_not_fit(name, at):
    tensors, indices = made(torch.float32)
    tensors[at] = torch.ones(3, 3)
    with pytest.raises(ValueError, match=rf"{name}: expected \(.*\), got \("):
        ours(*tensors, indices)
