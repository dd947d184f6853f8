"""Second derivatives, functional gradients and compilation of ``lora_linear_group``."""

from __future__ import annotations

import pytest
import torch
from lora_linear_harness import CPU_PATHS, PATHS, SEED
from test_lora_linear_group import (
    BACKENDS,
    DROPS,
    FP64,
    OWN,
    Group,
    call,
    expected,
    make,
    masks_of_next_call,
    part,
    quantise,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from lora_kernels import use_backend
from lora_kernels.testing import LoraCase

SMALL = (
    Group(LoraCase(lead=(3,), cols=9, gate="rank", bias=True, dtype=FP64), (3, 2), (2, 1), (0.0, 0.0)),
    Group(LoraCase(lead=(2, 2), cols=9, dtype=FP64), (3, 2), (2, 3), (0.4, 0.2)),
)


def checked(path, group):
    """The group as a function of its tensors that draws the same masks each time."""
    inputs = {name: t for name, t in make(group, "cpu").items() if t is not None}

    def function(*tensors):
        torch.manual_seed(SEED)
        given = dict.fromkeys(f"{name}{i}" for name in OWN for i in range(2))
        return call(path, given | dict(zip(inputs, tensors, strict=True)), group)

    return function, tuple(inputs.values())


@pytest.mark.parametrize("group", SMALL, ids=("gates", "dropout"))
@pytest.mark.parametrize("path", CPU_PATHS)
def test_gradcheck_twice(path, group):
    assert gradcheck(*checked(path, group), fast_mode=True)
    assert gradgradcheck(*checked(path, group), fast_mode=True)


@pytest.mark.parametrize("formats", ((), ("nf4", "int8", None)), ids=("dense", "quantised"))
@pytest.mark.parametrize("path", PATHS)
def test_double_backward_of_one_output(path, formats, device):
    group = Group(ps=DROPS)
    masks = masks_of_next_call(group, device)
    got, exact = make(group, device), make(group, device, dtype=FP64)
    quantise(formats, got, exact)
    for ys, inputs in ((call(path, got, group), got), (expected(exact, group, masks), exact)):
        (first,) = torch.autograd.grad(ys[1].square().sum(), inputs["x"], create_graph=True)
        first.square().sum().backward()
    for name, leaf in got.items():
        if isinstance(leaf, torch.Tensor) and exact[name].grad is not None:
            torch.testing.assert_close(leaf.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_double_backward_without_the_input_says_so(path, device):
    inputs = make(Group(), device, ("x", "lora_b"))
    y = call(path, inputs, Group())[0]
    with pytest.raises(RuntimeError, match="lora_linear_group: a double backward needs the input"):
        torch.autograd.grad(y.sum(), inputs["lora_b0"], create_graph=True)


def test_functional_gradients(device):
    group = Group(LoraCase(dtype=FP64))
    inputs = make(group, device)

    def loss(x):
        return sum(y.square().sum() for y in call("reference", {**inputs, "x": x}, group))

    x = inputs["x"].detach()
    want = make(group, device)
    sum(y.square().sum() for y in expected(want, group, [None] * 3)).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), want["x"].grad)


@pytest.mark.spread("backend", "ps", "formats", of=3)
@pytest.mark.parametrize("formats", ((), ("nf4", None, "int8")), ids=("dense", "quantised"))
@pytest.mark.parametrize("ps", ((0.0,) * 3, DROPS), ids=("plain", "dropout"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_for_any_token_count(backend, ps, formats, device):
    torch._dynamo.reset()
    group = Group(ps=ps)
    inputs = make(group, device, ("lora_a", "lora_b"))
    quantise(formats, inputs)
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x):
        return call(backend, {**inputs, "x": x}, group)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with use_backend(backend):
        for rows in (7, 12, 5):
            x, found = torch.randn(rows, 24, device=device), []
            for run in (compiled, layer):
                leaf = x.clone().requires_grad_()
                torch.manual_seed(rows)
                ys = run(leaf)
                wanted = [leaf, *part(inputs, group, "lora_a"), *part(inputs, group, "lora_b")]
                found.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), wanted)])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
