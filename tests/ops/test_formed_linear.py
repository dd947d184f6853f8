"""A linear whose weight is made at each call, against autograd over the weight made once."""

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.ops.formed_linear import HadamardProduct, HadamardUpdate, ScaledShifted, formed_linear
from lora_kernels.testing import assert_close

ROWS, IN, OUT, RANK = (3, 5), 12, 10, 3
NAMES = ("x", "weight", "bias", "b1", "a1", "b2", "a2")


def tensors(dtype, needs):
    torch.manual_seed(0)
    shapes = ((*ROWS, IN), (OUT, IN), (OUT,), (OUT, RANK), (RANK, IN), (OUT, RANK), (RANK, IN))
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_(name in needs) for name, t in zip(NAMES, made, strict=True)]


def by_autograd(x, weight, bias, b1, a1, b2, a2, kind):
    delta = {
        "update": lambda: weight * (b1 @ a1),
        "product": lambda: 0.5 * (b1 @ a1) * (b2 @ a2),
        "scaled": lambda: weight * (b1 @ a1) + b2 @ a2,
        "scaled by columns": lambda: weight * b1[:, :1] + b2[:, :1],
        "scaled by numbers": lambda: weight * b1[0, 0] + b2[0, 0],
    }[kind]()
    return F.linear(x, weight + delta, bias)


def ours(x, weight, bias, b1, a1, b2, a2, kind):
    if kind == "update":
        return formed_linear(x, weight, bias, HadamardUpdate(), (b1, a1, weight))
    if kind == "product":
        return formed_linear(x, weight, bias, HadamardProduct(0.5), (b1, a1, b2, a2))
    paths = {
        "scaled": (b1, a1, b2, a2),
        "scaled by columns": (b1[:, :1], b2[:, :1]),
        "scaled by numbers": (b1[:1, :1], b2[:1, :1]),
    }
    return formed_linear(x, weight, bias, ScaledShifted(), (weight, *paths[kind]))


def run(function, kind, dtype, needs):
    given = tensors(dtype, needs)
    y = function(*given, kind)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype))
    found = {name: t.grad for name, t in zip(NAMES, given, strict=True) if t.grad is not None}
    return {"y": y.detach()} | found


@pytest.mark.parametrize("needs", [NAMES, ("x",), ("b1",), ("x", "a1", "a2"), ("weight",)], ids="-".join)
@pytest.mark.parametrize("kind", ["product", "update", "scaled", "scaled by columns", "scaled by numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_y_and_every_gradient(kind, dtype, needs):
    if kind == "update" and not set(needs) & {"x", "weight", "b1", "a1"}:
        pytest.skip("no such tensor")
    found, eager = (run(function, kind, dtype, needs) for function in (ours, by_autograd))
    exact = run(by_autograd, kind, torch.float64, needs)
    assert found.keys() == eager.keys()
    for name in found:
        assert_close(found[name], eager[name], exact[name], name, ulps=4.0)


@pytest.mark.parametrize("kind", ["product", "update", "scaled"])
def test_nothing_the_size_of_the_weight_is_kept(kind):
    given, kept = tensors(torch.float32, ("x", "b1", "a1", "b2", "a2")), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(*given, kind)
    held = {t.data_ptr() for t in given}
    assert all(t.data_ptr() in held for t in kept if t.shape == (OUT, IN))


@pytest.mark.parametrize("kind", ["product", "scaled"])
def test_transforms_and_compile(kind):
    given = tensors(torch.float64, ())
    expected = by_autograd(*given, kind)
    vmapped = torch.vmap(lambda x: ours(x, *given[1:], kind))(given[0])
    torch.testing.assert_close(vmapped, expected)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given, kind), expected)
