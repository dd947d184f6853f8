"""MTLoRA's linear of several outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn import MultiTaskLinear

IN, OUT, TASKS, WIDE = 6, 5, ("seg", "depth"), torch.float64
MODES = ("matrix", "matrixv2", "addition")


def new(mode, **options):
    torch.manual_seed(0)
    options = {"r": 3, "r_task": {"seg": 2, "depth": 1}, "lora_dropout": 0.0, **options}
    layer = MultiTaskLinear(IN, OUT, TASKS, mode=mode, dtype=WIDE, **options)
    with torch.no_grad():
        for factor in layer.lora_B.values():
            factor.normal_()
    return layer


def dense(layer, x, x_tasks):
    """The three forms, from the factors."""
    base = F.linear(x, layer.weight, layer.bias)

    def branch(name, x):
        return layer.scales[name] * x @ layer.lora_A[name].T @ layer.lora_B[name].T

    ys = {name: base + branch(name, x_tasks.get(name, x)) for name in TASKS}
    if layer.mode == "addition":
        return base + layer.norm(sum(ys.values())), ys
    shared = branch("shared", x)
    if layer.mode == "matrixv2":
        ys = {name: y + shared for name, y in ys.items()}
    return base + shared, ys


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streams", [(), ("seg",), TASKS])
@pytest.mark.parametrize("train_scales", [False, True])
def test_values_and_gradients(mode, streams, train_scales):
    layer = new(mode, train_scales=train_scales)
    x = torch.randn(2, 3, IN, dtype=WIDE, requires_grad=True)
    x_tasks = {name: torch.randn(2, 3, IN, dtype=WIDE, requires_grad=True) for name in streams}
    leaves = [x, *x_tasks.values(), *(p for p in layer.parameters() if p.requires_grad)]
    sums = []
    dys = torch.randn(3, 2, 3, OUT, dtype=WIDE)
    for y, ys in (layer(x, x_tasks), dense(layer, x, x_tasks)):
        sums.append(sum((one * dy).sum() for one, dy in zip((y, *ys.values()), dys, strict=True)))
    torch.testing.assert_close(*sums)
    ours, theirs = (torch.autograd.grad(one, leaves) for one in sums)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_start_and_count(mode):
    linear = nn.Linear(IN, OUT)
    layer = MultiTaskLinear.from_linear(linear, TASKS, r=3, r_task=2, mode=mode).eval()
    x = torch.randn(4, IN)
    y, ys = layer(x)
    assert layer.weight is linear.weight and not layer.weight.requires_grad
    assert all(torch.equal(one, linear(x)) for one in ys.values())
    assert torch.equal(y, linear(x)) == (mode != "addition")
    norm = 2 * OUT if mode == "addition" else 0
    shared = 0 if mode == "addition" else 3 * (IN + OUT)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == shared + 2 * 2 * (IN + OUT) + norm


def test_all_branches_that_read_x_drop_the_same():
    layer, x = new("matrix", lora_dropout=0.5), torch.randn(4, IN, dtype=WIDE)
    torch.manual_seed(1)
    y, ys = layer(x)
    torch.manual_seed(1)
    d, base = F.dropout(x, 0.5), F.linear(x, layer.weight, layer.bias)
    for name, one in (("shared", y), *ys.items()):
        want = base + 4 * d @ layer.lora_A[name].T @ layer.lora_B[name].T
        torch.testing.assert_close(one, want)


def test_half_precision_base_and_compile():
    layer = MultiTaskLinear(IN, OUT, TASKS, dtype=torch.bfloat16, mode="addition").eval()
    y, ys = layer(torch.randn(3, IN, dtype=torch.bfloat16))
    assert {one.dtype for one in (y, *ys.values())} == {torch.bfloat16}
    assert {p.dtype for p in layer.lora_A.values()} == {torch.float32}
    torch._dynamo.reset()
    layer, x = new("matrixv2"), torch.randn(3, IN, dtype=WIDE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[1], layer(x)[1])


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"tasks": []}, ValueError, "tasks: expected different names"),
        ({"tasks": ["shared"]}, ValueError, "tasks: expected different names"),
        ({"tasks": "seg"}, TypeError, "tasks: expected a list of names, got 'seg'"),
        ({"mode": "no"}, ValueError, "mode: expected one of matrix, matrixv2, addition, got 'no'"),
        ({"r": 0}, ValueError, "r: expected a rank of at least 1, got 0"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: expected 0 <="),
        ({"depth": 1}, TypeError, "options: expected r, .*got depth"),
    ],
)
def test_what_it_refuses(options, error, words):
    linear = nn.Linear(IN, OUT)
    with pytest.raises(error, match=words):
        MultiTaskLinear.from_linear(linear, **{"tasks": TASKS, **options})
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match="x_tasks: expected seg, depth, got 'no'"):
        new("matrix")(torch.ones(1, IN, dtype=WIDE), {"no": torch.ones(1, IN, dtype=WIDE)})
