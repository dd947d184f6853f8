"""The C++ branch: sums that no thread count changes, and what dropout removes is gone."""

import pytest
import torch
from lora_linear_harness import run_case

from lora_kernels import _backend, _cpu_ways, lora_linear, use_backend
from lora_kernels.testing import LoraCase, leaves, lora_inputs

pytestmark = pytest.mark.skipif(
    _backend.unavailable("cpp", "cpu", torch.float32, 8) is not None, reason="the extension is not built"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _gradients(case, count, threads):
    threads(count)
    inputs = leaves(lora_inputs(case, torch.device("cpu")), ("x", "lora_a", "lora_b"))
    torch.manual_seed(3)
    with use_backend("cpp"):
        y = lora_linear(
            inputs["x"], None, inputs["lora_a"], inputs["lora_b"], case.scaling, dropout_p=case.dropout_p
        )
    y.square().sum().backward()
    return [y.detach(), *(inputs[name].grad for name in ("x", "lora_a", "lora_b"))]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_factors_gradients_do_not_depend_on_threads(dtype, rank, dropout_p, threads):
    """With our products: a vendor's may split a sum by threads, as MKL's for AVX2 do."""
    case = LoraCase(
        lead=(301,), cols=515, out=259, rank=rank, dtype=dtype, dropout_p=dropout_p, weight="none"
    )
    with _cpu_ways.forced("panels"):
        one, two, four = (_gradients(case, count, threads) for count in (1, 2, 4))
    for a, b, c in zip(one[2:], two[2:], four[2:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dropped_element_leaves_no_trace(bad):
    """0 · NaN is NaN: the mask selects, it does not multiply."""
    x = torch.randn(9, 40)
    lora_a, lora_b = torch.randn(3, 40, requires_grad=True), torch.randn(5, 3)
    with use_backend("cpp"):
        torch.manual_seed(0)
        probe = torch.eye(40)[:9].requires_grad_()  # its gradient shows which elements are kept
        lora_linear(probe, None, torch.ones(1, 40), torch.ones(1, 1), dropout_p=0.5).sum().backward()
        dropped = (probe.grad == 0).nonzero()
        assert len(dropped)
        x[tuple(dropped.T)] = bad
        torch.manual_seed(0)
        y = lora_linear(x, None, lora_a, lora_b, dropout_p=0.5)
        y.sum().backward()
    assert y.isfinite().all() and lora_a.grad.isfinite().all()


@pytest.mark.parametrize(("rows", "cols", "out"), [(64, 8192, 96), (64, 96, 8192), (8192, 96, 64)])
def test_long_sums_round_no_worse_than_twice_eager(rows, cols, out):
    """One chain of additions over thousands of columns or rows loses more than a blocked product does."""
    case = LoraCase(lead=(rows,), cols=cols, out=out, rank=16, weight="none")
    run_case("cpp", case, torch.device("cpu"))
