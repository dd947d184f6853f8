"""What is saved, what autograd's tools see, and what the compiler traces."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from lora_linear_harness import CPU_PATHS, PATHS, SEED, call, expected, mask_of_next_call
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, use_backend
from lora_kernels.testing import TENSORS, LoraCase, assert_close, leaves, lora_inputs

ADAPTERS = ("lora_a", "lora_b")
BACKENDS = ("reference", "cpp", "triton")


@contextlib.contextmanager
def recorded():
    """The tensors that autograd saves inside the block, one entry per piece of memory."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_by(path, case, requires_grad, device):
    inputs = leaves(lora_inputs(case, device), requires_grad)
    with recorded() as saved:
        y = call(path, inputs, case)
    return inputs, y, list(saved.values())


def same_memory(tensor, others):
    return any(tensor.untyped_storage().data_ptr() == o.untyped_storage().data_ptr() for o in others)


@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
@pytest.mark.parametrize("path", PATHS)
def test_frozen_a_and_weight_save_no_input(path, dropout_p, device):
    case = LoraCase(dropout_p=dropout_p)
    inputs, _, saved = saved_by(path, case, ("x", "lora_b"), device)
    assert not same_memory(inputs["x"], saved)


@pytest.mark.parametrize("path", PATHS)
def test_frozen_everything_but_b_saves_h_and_no_mask(path, device):
    case = LoraCase(dropout_p=0.1)
    inputs, _, saved = saved_by(path, case, ("lora_b",), device)
    assert not any(t.dtype == torch.uint8 for t in saved)
    assert not same_memory(inputs["x"], saved)
    assert not same_memory(inputs["weight"], saved)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_saved_bytes_are_x_h_and_one_bit_an_element(path, dtype, device):
    case = LoraCase(lead=(40,), cols=44, out=36, dtype=dtype, dropout_p=0.1)
    inputs, y, saved = saved_by(path, case, ("x", *ADAPTERS), device)
    item = dtype.itemsize
    parameters = sum(inputs[name].numel() for name in ("weight", *ADAPTERS)) * item
    bound = 40 * 44 * item + 40 * 4 * item + 40 * 6 + parameters
    assert sum(t.numel() * t.element_size() for t in saved) == bound
    assert not same_memory(y, saved)


@pytest.mark.parametrize("path", PATHS)
def test_without_gradients_nothing_is_saved(path, device):
    case = LoraCase(dropout_p=0.1)
    _, y, saved = saved_by(path, case, (), device)
    assert not saved and not y.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensor_hooks_may_move_tensors(backend, device):
    case = LoraCase(dropout_p=0.2)
    gradients = []
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        inputs = leaves(lora_inputs(case, device), ("x", *ADAPTERS))
        torch.manual_seed(1)
        with hooks:
            y = call(backend, inputs, case)
        y.sum().backward()
        gradients.append([inputs[name].grad for name in ("x", *ADAPTERS)])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_repeats_the_mask(backend, device):
    case = LoraCase(dropout_p=0.4)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        inputs = leaves(lora_inputs(case, device), ("x", *ADAPTERS))

        def layer(x, inputs=inputs):
            return call(backend, {**inputs, "x": x}, case).relu()

        torch.manual_seed(1)
        with use_backend(backend):
            run(layer, inputs["x"]).sum().backward()
        gradients.append([inputs[name].grad for name in ("x", *ADAPTERS)])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("adapters", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, adapters, device):
    case = LoraCase(bias=True, gate="rank", adapter_dtype=adapters)
    given = lora_inputs(case, device)
    inputs, plain, wide = (leaves(given, case.present(), dtype) for dtype in (None, None, torch.float64))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = call(backend, inputs, case)
    half = {n: None if t is None else t.bfloat16() for n, t in plain.items()}
    eager, exact = expected(half, case, None), expected(wide, case, None)
    assert y.dtype == torch.bfloat16
    for result in (y, eager, exact):
        result.float().square().sum().backward()
    assert_close(y, eager, exact, "y")
    for name in case.present():
        assert inputs[name].grad.dtype == given[name].dtype
        assert_close(inputs[name].grad, plain[name].grad, wide[name].grad, name, torch.bfloat16)


class Layer(torch.nn.Module):
    def __init__(self, inputs, dropout_p=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(inputs["weight"], requires_grad=False)
        self.lora_a = torch.nn.Parameter(inputs["lora_a"])
        self.lora_b = torch.nn.Parameter(inputs["lora_b"])
        self.dropout_p = dropout_p

    def forward(self, x):
        return lora_linear(x, self.weight, self.lora_a, self.lora_b, 0.75, dropout_p=self.dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call(backend, device):
    layer = Layer(lora_inputs(LoraCase(), device))
    other = leaves(lora_inputs(LoraCase(), device, seed=5), ADAPTERS)
    x = lora_inputs(LoraCase(), device)["x"]
    with use_backend(backend):
        y = functional_call(layer, {name: other[name] for name in ADAPTERS}, (x,))
        want = lora_linear(x, layer.weight, other["lora_a"], other["lora_b"], 0.75)
    y.sum().backward()
    assert torch.equal(y, want)
    assert other["lora_a"].grad is not None and layer.lora_a.grad is None


CHECKED = (
    LoraCase(),
    LoraCase(dropout_p=0.4, lead=(2, 2)),
    LoraCase(bias=True, gate="rows", lead=(2, 2)),
    LoraCase(x_lora=True, gate="rank", bias=True, dropout_p=0.3),
    LoraCase(weight="none", gate="rank"),
)
CHECKED = tuple(replace(case, cols=9, out=3, rank=2, dtype=torch.float64) for case in CHECKED)


def checked(path, case):
    """The case as a function of its tensors that draws the same mask each time."""
    names = case.present()

    def function(*tensors):
        torch.manual_seed(SEED)
        inputs = dict.fromkeys(TENSORS) | dict(zip(names, tensors, strict=True))
        return call(path, inputs, case)

    tensors = leaves(lora_inputs(case), names)
    return function, tuple(tensors[name] for name in names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_torch_func(backend, device):
    case = LoraCase(lead=(4,), gate="rank")
    inputs = lora_inputs(case, device)
    rest = {name: value for name, value in inputs.items() if name != "lora_a"}

    def loss(lora_a):
        return call(backend, {**rest, "lora_a": lora_a}, case).square().sum()

    with use_backend(backend):
        got = grad(loss)(inputs["lora_a"])
        _, along = jvp(loss, (inputs["lora_a"],), (inputs["lora_a"],))
        each = vmap(lambda x: call(backend, {**inputs, "x": x}, case))(inputs["x"])
        whole = call(backend, inputs, case)
    lora_a = inputs["lora_a"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(lora_a), lora_a)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(along, (want * lora_a).sum())
    torch.testing.assert_close(each, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_under_grad_of_torch_func(backend, device):
    case = LoraCase(dropout_p=0.4)
    inputs = lora_inputs(case, device)

    def loss(lora_a):
        return call(backend, {**inputs, "lora_a": lora_a}, case).square().sum()

    torch.manual_seed(SEED)
    got = grad(loss)(inputs["lora_a"])
    torch.manual_seed(SEED)
    lora_a = inputs["lora_a"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(lora_a), lora_a)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", CHECKED, ids=range(len(CHECKED)))
@pytest.mark.parametrize("path", CPU_PATHS)
def test_gradcheck(path, case):
    assert gradcheck(*checked(path, case), fast_mode=len(case.lead) > 1)


@pytest.mark.parametrize("case", CHECKED, ids=range(len(CHECKED)))
@pytest.mark.parametrize("path", CPU_PATHS)
def test_gradgradcheck(path, case):
    assert gradgradcheck(*checked(path, case), fast_mode=True)


@pytest.mark.parametrize("case", CHECKED, ids=range(len(CHECKED)))
@pytest.mark.parametrize("path", PATHS)
def test_double_backward_equals_the_composite(path, case, device):
    case = replace(case, dtype=torch.float32)
    names = case.present()
    given, mask = lora_inputs(case, device), mask_of_next_call(case, device)
    inputs, wide = leaves(given, names), leaves(given, names, torch.float64)
    torch.manual_seed(SEED)
    for y, tensors in ((call(path, inputs, case), inputs), (expected(wide, case, mask), wide)):
        first = torch.autograd.grad(
            y.square().sum(), [tensors[n] for n in names], create_graph=True, materialize_grads=True
        )
        sum(g.square().sum() for g in first).backward()
    for name in names:
        torch.testing.assert_close(inputs[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("requires_grad", "x_lora"), ((("x", "lora_b"), False), (("x", "lora_a", "lora_b"), True))
)
@pytest.mark.parametrize("path", PATHS)
def test_double_backward_without_the_input_says_so(path, requires_grad, x_lora, device):
    case = LoraCase(x_lora=x_lora)
    inputs = leaves(lora_inputs(case, device), requires_grad)
    y = call(path, inputs, case)
    with pytest.raises(RuntimeError, match="double backward needs the input"):
        torch.autograd.grad(y.sum(), inputs["lora_b"], create_graph=True)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def equal_to_eager(compiled, layer, rows, device):
    """Output and gradients of both for the same mask."""
    x = torch.randn(rows, layer.lora_a.shape[1], device=device)
    found = []
    for run in (compiled, layer):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(rows)
        y = run(leaf)
        y.square().mean().backward()
        found.append([y.detach(), leaf.grad, layer.lora_a.grad, layer.lora_b.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.spread("backend", "dropout_p", of=2)
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_for_any_token_count(backend, dropout_p, device, fresh_dynamo):
    layer = Layer(lora_inputs(LoraCase(), device), dropout_p)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with use_backend(backend):
        for rows in (7, 12, 5, 33, 18):
            equal_to_eager(compiled, layer, rows, device)
    assert counter.frame_count <= 2, "more than one static and one dynamic graph"


@pytest.mark.parametrize(
    "case",
    (
        LoraCase(lead=(2, 3), bias=True, gate="rows"),
        LoraCase(x_lora=True, gate="rank"),
        LoraCase(weight="none", factors="views"),
        LoraCase(dtype=torch.bfloat16, adapter_dtype=torch.float32),
    ),
    ids=("rows-gate", "x_lora", "branch", "fp32-adapters"),
)
@pytest.mark.spread("backend", "case", of=3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_options(backend, case, device, fresh_dynamo):
    names, found = case.present(), []

    def layer(inputs):
        args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
        options = {name: inputs[name] for name in ("bias", "gate", "x_lora")}
        return lora_linear(*args, case.scaling, **options)

    with use_backend(backend):
        for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
            inputs = leaves(lora_inputs(case, device), names)
            y = run(inputs)
            y.sum().backward()
            found.append([y.detach(), *(inputs[name].grad for name in names)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_inductor(device, fresh_dynamo):
    layer = Layer(lora_inputs(LoraCase(), device), 0.1)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (7, 12, 30):
        equal_to_eager(compiled, layer, rows, device)
    assert counter.frame_count <= 2
