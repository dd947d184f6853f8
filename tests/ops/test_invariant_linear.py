"""A linear whose rows do not depend on the batch: exact, bitwise invariant, differentiable."""

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import use_backend
from lora_kernels.ops.invariant_linear import invariant_linear
from lora_kernels.testing import assert_close

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "cols", "out"), [(1, 1, 1), (19, 70, 67), (5, 300, 130), (0, 8, 4)])
def test_it_is_the_linear(backend, dtype, rows, cols, out, device):
    x, weight, bias = torch.randn(rows, cols), torch.randn(out, cols), torch.randn(out)
    given = [t.to(device, dtype) for t in (x, weight, bias)]
    with use_backend(backend):
        y = invariant_linear(*given)
    host = [t.cpu() for t in given]
    assert_close(y.cpu(), F.linear(*host), F.linear(*(t.double() for t in host)), dtype=dtype, ulps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_leading_dimensions(backend, device):
    x = torch.randn(2, 3, 40, device=device)[..., ::2]
    weight = torch.randn(20, 9, device=device).T
    with use_backend(backend):
        torch.testing.assert_close(invariant_linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_depends_on_the_others(backend, dtype, device):
    x, weight = torch.randn(64, 333).to(device, dtype), torch.randn(70, 333).to(device, dtype)
    with use_backend(backend):
        whole = invariant_linear(x, weight)
        for _ in range(6 if backend == "triton" else 100):
            some = torch.randperm(64, device=device)[: int(torch.randint(1, 65, ()))]
            assert torch.equal(invariant_linear(x[some], weight), whole[some])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_linears(backend, device):
    x, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((6, 9), (5, 9), (5,)))
    dy = torch.randn(6, 5, device=device)
    with use_backend(backend):
        got = torch.autograd.grad(invariant_linear(x, weight, bias), (x, weight, bias), dy)
    for ours, theirs in zip(
        got, torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    x, weight = torch.randn(9, 128), torch.randn(300, 128)
    try:
        torch.set_num_threads(threads)
        y = invariant_linear(x, weight)
        torch.set_num_threads(1)
        assert torch.equal(y, invariant_linear(x, weight))
    finally:
        torch.set_num_threads(before)


def test_bad_input():
    with pytest.raises(ValueError, match=r"weight: expected shape \(N, 4\)"):
        invariant_linear(torch.randn(2, 4), torch.randn(3, 5))
    with pytest.raises(TypeError, match="weight: expected torch"):
        invariant_linear(torch.randn(2, 4), torch.randn(3, 4).half())
