"""Pairs turned each by a matrix of its own, against autograd over the dense matrix."""

import pytest
import torch

from lora_kernels.ops.turned_pairs import turned_pairs
from lora_kernels.testing import assert_close


def by_matrix(x, diagonal, beside, group):
    """R x, R made entry by entry."""
    width = len(diagonal)
    entries = [[x.new_zeros(()) for _ in range(width)] for _ in range(width)]
    for i in range(width):
        first = i % group < group // 2
        j = i + group // 2 if first else i - group // 2
        entries[i][i], entries[i][j] = diagonal[i], -beside[i] if first else beside[i]
    return x @ torch.stack([torch.stack(row) for row in entries]).T


def tensors(dtype, lead=(3, 5), width=12, transposed=False):
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=torch.float64) for shape in ((*lead, width), (width,), (width,))]
    x, diagonal, beside = (t.to(dtype) for t in made)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
    return [t.requires_grad_() for t in (x, diagonal, beside)]


def run(function, given, group):
    y = function(*given, group)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), given)]


@pytest.mark.parametrize("lead", [(3, 5), (4,), (), (0,)], ids=str)
@pytest.mark.parametrize("group", [2, 4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_y_and_every_gradient(dtype, group, lead):
    ours, eager = (run(function, tensors(dtype, lead), group) for function in (turned_pairs, by_matrix))
    exact = run(by_matrix, tensors(torch.float64, lead), group)
    for at, found in enumerate(zip(ours, eager, exact, strict=True)):
        assert_close(*found, f"result {at}", ulps=4.0)


def test_rows_that_do_not_lie_in_order():
    found, wanted = (run(turned_pairs, tensors(torch.float64, transposed=turn), 4) for turn in (True, False))
    torch.testing.assert_close(found, wanted)


def test_what_it_returns_may_be_written_over():
    given = tensors(torch.float64, (5,))
    found, wanted = (
        run(lambda *t, function=function: function(*t).relu_(), given, 4)
        for function in (turned_pairs, by_matrix)
    )
    torch.testing.assert_close(found, wanted)


def test_gradcheck_transforms_and_compile():
    given = tensors(torch.float64, (2,), 8)
    assert torch.autograd.gradcheck(lambda *t: turned_pairs(*t, 4), given)
    wanted = turned_pairs(*given, 4)
    vmapped = torch.vmap(lambda x: turned_pairs(x, *given[1:], 4))(given[0])
    torch.testing.assert_close(vmapped, wanted)
    compiled = torch.compile(turned_pairs, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, given, 4), run(turned_pairs, given, 4))


@pytest.mark.parametrize("group", [0, 3, 8, -2])
def test_groups_that_do_not_fit(group):
    with pytest.raises(ValueError, match=rf"group: expected an even divisor of 12.*, got {group}"):
        turned_pairs(torch.ones(2, 12), torch.ones(12), torch.ones(12), group)


@pytest.mark.parametrize("name", ["diagonal", "beside"])
def test_columns_that_do_not_fit(name):
    columns = {"diagonal": torch.ones(12), "beside": torch.ones(12)} | {name: torch.ones(6)}
    with pytest.raises(ValueError, match=rf"{name}: expected \[12\].*\(6,\)"):
        turned_pairs(torch.ones(2, 12), **columns, group=4)
