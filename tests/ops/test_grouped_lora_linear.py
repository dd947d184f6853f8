"""LoRA on several experts' linears, for rows in the order of their experts."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import grouped_lora_linear
from lora_kernels.reference.grouped_lora_linear import composite
from lora_kernels.testing import assert_close

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
# Rows of each expert, and rows behind the last.
COUNTS = {"odd": ((5, 1, 8), 0), "empty": ((0, 7, 0, 3), 0), "behind": ((2, 0, 4), 3), "none": ((0, 0), 0)}


def tensors(counts, behind=0, dtype=torch.float64, sizes=(7, 5, 3), wide=None):
    generator = torch.Generator().manual_seed(1)
    (cols, out, rank), experts = sizes, len(counts)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    offsets = torch.tensor([0, *counts]).cumsum(0)
    # The weight as gpt-oss keeps it, [E, in, out], and B as PEFT does, the experts last.
    weight, lora_b = (
        normal(experts, cols, out).mT,
        normal(out, rank, experts, kind=wide or dtype).permute(2, 0, 1),
    )
    lora_a = normal(experts, rank, cols, kind=wide or dtype)
    return (normal(sum(counts) + behind, cols), weight, lora_a, lora_b, normal(experts, out)), offsets


def results(op, given, offsets, dtype=None):
    given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
    x, weight, lora_a, lora_b, bias = given
    y = op(x, weight, lora_a, lora_b, offsets, bias)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return dict(zip(("y", *NAMES), (y, *torch.autograd.grad(y, given, dy)), strict=True))


def ours(x, weight, lora_a, lora_b, offsets, bias):
    return grouped_lora_linear(x, weight, lora_a, lora_b, offsets, 0.75, bias)


def oracle(x, weight, lora_a, lora_b, offsets, bias):
    return composite(x, weight, lora_a, lora_b, bias, offsets, 0.75)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("counts", COUNTS)
def test_output_and_gradients(counts, dtype):
    given, offsets = tensors(
        *COUNTS[counts], dtype=dtype, wide=torch.float32 if dtype is torch.bfloat16 else None
    )
    got = results(ours, given, offsets)
    eager, exact = results(oracle, given, offsets), results(oracle, given, offsets, torch.float64)
    for name in got:
        assert got[name].dtype == eager[name].dtype
        assert_close(got[name], eager[name], exact[name], name, dtype, ulps=2.0)


def test_a_frozen_base_has_no_gradient_and_nothing_of_its_size_is_made():
    (x, weight, lora_a, lora_b, _), offsets = tensors((40, 40), sizes=(64, 48, 2))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made._base is None:
                sizes.append(made.numel())
            return made

    for t in (x, lora_a, lora_b):
        t.requires_grad_()
    with Sizes():
        grouped_lora_linear(x, weight, lora_a, lora_b, offsets).sum().backward()
    assert weight.grad is None and lora_a.grad is not None
    assert max(size for size in sizes if size != x.numel()) < 80 * 64 < weight.numel()


def test_traced_whole():
    given, offsets = tensors((5, 0, 3))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, eager = results(compiled, given, offsets), results(ours, given, offsets)
    assert all(torch.equal(got[name], eager[name]) for name in eager)


def test_autocast_changes_no_dtype():
    (x, weight, lora_a, lora_b, bias), offsets = tensors((5, 3), dtype=torch.float32)
    plain = grouped_lora_linear(x, weight, lora_a, lora_b, offsets, 0.5, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_lora_linear(x, weight, lora_a, lora_b, offsets, 0.5, bias), plain)


def test_transforms():
    (x, weight, lora_a, lora_b, _), offsets = tensors((5, 3))
    got = torch.func.grad(lambda a: grouped_lora_linear(x, weight, a, lora_b, offsets).sum())(lora_a)
    lora_a.requires_grad_()
    (want,) = torch.autograd.grad(grouped_lora_linear(x, weight, lora_a, lora_b, offsets).sum(), lora_a)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.ones(8, 6)}, ValueError, r"x: expected shape \(8, 7\), got \(8, 6\)"),
        ({"weight": torch.ones(5, 7)}, ValueError, "weight: expected 3 dimensions, got 2"),
        ({"lora_b": torch.ones(2, 5, 4)}, ValueError, r"lora_b: expected shape \(2, 5, 3\)"),
        ({"offsets": torch.tensor([0, 8])}, ValueError, r"offsets: expected shape \(3,\)"),
        ({"offsets": torch.ones(3)}, TypeError, "offsets: expected int32 or int64"),
        ({"weight": torch.ones(2, 5, 7).half()}, TypeError, "weight: expected torch.float32"),
        ({"lora_a": None}, TypeError, "lora_a: expected a Tensor, got NoneType"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(2, 5\)"),
        ({"x": torch.ones(8, 7, device="meta")}, ValueError, "weight: expected device meta"),
    ],
)
def test_errors(changed, error, words):
    (x, weight, lora_a, lora_b, bias), offsets = tensors((5, 3), dtype=torch.float32)
    given = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias, "offsets": offsets}
    with pytest.raises(error, match=words):
        grouped_lora_linear(**{**given, **changed})
