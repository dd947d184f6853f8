"""``lora_mlp`` on every backend: the values, gradients and masks of three linears, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lora_linear_harness import CPU_PATHS, PATHS, on
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAProjection, _backend, lora_linear, lora_mlp, use_backend
from lora_kernels._arguments import LoraInputs
from lora_kernels.reference.dropout import dropout_mask
from lora_kernels.reference.glu import composite as glu_composite
from lora_kernels.reference.lora_linear import composite
from lora_kernels.testing import LoraCase, assert_close, leaves, lora_inputs

BACKENDS = ("reference", "cpp", "triton")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
FP32, BF16, HALF, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PARTS, OWN = ("gate", "up", "down"), ("weight", "lora_a", "lora_b", "bias")
EVERYTHING = ("x", *OWN)
SCALINGS = {"gate": 0.75, "up": 2.0, "down": -1.5}
SEED = 11


@dataclass(frozen=True)
class Block:
    """x [*lead, cols] -> hidden -> out."""

    lead: tuple[int, ...] = (7,)
    cols: int = 24
    hidden: int = 21
    out: int = 13
    ranks: tuple[int, int, int] = (4, 3, 5)
    ps: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bias: bool = False
    dtype: torch.dtype = FP32
    adapter_dtype: torch.dtype | None = None
    x_layout: str = "dense"
    activation: str = "silu"

    def cases(self):
        sizes = ((self.cols, self.hidden), (self.cols, self.hidden), (self.hidden, self.out))
        common = {"lead": self.lead, "bias": self.bias, "dtype": self.dtype, "x_layout": self.x_layout}
        common["adapter_dtype"] = self.adapter_dtype
        return {
            name: LoraCase(cols=k, out=n, rank=r, dropout_p=p, **common)
            for name, (k, n), r, p in zip(PARTS, sizes, self.ranks, self.ps, strict=True)
        }


DROPS = (0.3, 0.1, 0.4)


def make(block, device, requires_grad=EVERYTHING, dtype=None):
    """{"x": …, "gate.weight": …, …} as leaves; ``requires_grad`` has whole names or their last parts."""
    made = {}
    for i, (name, case) in enumerate(block.cases().items()):
        own = lora_inputs(case, device, seed=i)
        made.setdefault("x", own["x"])
        made |= {f"{name}.{part}": own[part] for part in OWN if own[part] is not None}
    wanted = [n for n in made if n in requires_grad or n.rpartition(".")[2] in requires_grad]
    return leaves(made, wanted, dtype)


def projections(inputs, block):
    for name, p in zip(PARTS, block.ps, strict=True):
        weight, lora_a, lora_b, bias = (inputs.get(f"{name}.{part}") for part in OWN)
        yield LoRAProjection(weight, lora_a, lora_b, SCALINGS[name], bias, p)


def call(path, inputs, block):
    with on(path):
        return lora_mlp(inputs["x"], *projections(inputs, block), block.activation)


def masks_of_next_call(block, device):
    """The keep bits that three calls would draw after ``manual_seed(SEED)``, and that seed set again."""
    torch.manual_seed(SEED)
    masks = {}
    for name, case in block.cases().items():
        drawn = torch.empty(1, dtype=torch.int64, device=device).random_() if case.dropout_p else None
        masks[name] = None if drawn is None else dropout_mask(drawn, case.rows, case.cols, case.dropout_p)
    torch.manual_seed(SEED)
    return masks


def expected(inputs, block, masks):
    def linear(name, x):
        weight, lora_a, lora_b, bias = (inputs.get(f"{name}.{part}") for part in OWN)
        p = block.cases()[name].dropout_p
        branch = (None, None, None, SCALINGS[name], p)
        return composite(LoraInputs(x, weight, lora_a, lora_b, bias, *branch), masks[name])

    x = inputs["x"].reshape(-1, block.cols)
    product = glu_composite(linear("gate", x), linear("up", x), block.activation)
    return linear("down", product).view(*block.lead, block.out)


def run(path, block, device, requires_grad=EVERYTHING):
    if reason := _backend.unavailable(path.removesuffix("-function"), device.type, block.dtype, 4):
        pytest.skip(f"{path}: {reason}")
    masks = masks_of_next_call(block, device)
    dy = torch.randn(*block.lead, block.out, generator=torch.Generator().manual_seed(1)).to(device)
    got, eager = (make(block, device, requires_grad) for _ in range(2))
    exact = make(block, device, requires_grad, FP64)
    results = call(path, got, block), expected(eager, block, masks), expected(exact, block, masks)
    for y in results:
        if y.requires_grad:
            y.backward(dy.to(y.dtype))
    assert results[0].dtype == block.dtype and results[0].shape == results[2].shape
    assert_close(*results, "y", block.dtype)
    for name, leaf in got.items():
        grads = [given[name].grad for given in (got, eager, exact)]
        if grads[2] is None:
            assert grads[0] is None, f"{name} got a gradient that nothing asked for"
            continue
        assert grads[0] is not None, f"{name} got no gradient"
        assert grads[0].dtype == leaf.dtype
        assert_close(*grads, name, block.dtype)
    return [results[0], *(leaf.grad for leaf in got.values())]


VARIANTS = {
    "plain": Block(),
    "dropout": Block(ps=DROPS),
    "down alone drops": Block(ps=(0.0, 0.0, 0.5), bias=True),
    "three dimensions": Block(lead=(2, 5), bias=True, ps=DROPS),
    "one row": Block(lead=(), bias=True),
    "no rows": Block(lead=(0,), bias=True, ps=DROPS),
    "columns": Block(x_layout="columns"),
    "wide ranks": Block(lead=(9,), cols=40, hidden=50, ranks=(33, 17, 40), ps=DROPS),
    "more than a block of elements": Block(lead=(40,), hidden=70, ps=DROPS),
    "fp32 adapters": Block(dtype=BF16, adapter_dtype=FP32, ps=DROPS),
}


@pytest.mark.spread("path", "name", "activation", of=3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
def test_variant(path, name, activation, device):
    run(path, Block(**{**vars(VARIANTS[name]), "activation": activation}), device)


@pytest.mark.parametrize("dtype", (BF16, HALF, FP64), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_dtype(path, activation, dtype, device):
    run(path, Block(ps=DROPS, bias=True, dtype=dtype, activation=activation), device)


SUBSETS = [
    (),
    ("x",),
    ("lora_a", "lora_b"),
    ("down.lora_b",),
    ("down.lora_a",),
    ("down.bias", "down.weight"),
    ("gate.lora_b",),
    ("up.lora_a", "down.lora_b"),
    ("x", "weight"),
]


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("path", PATHS)
def test_requires_grad_subset(path, subset, device):
    run(path, Block(bias=True, ps=DROPS), device, subset)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero_the_gradients_are_finite_and_right(backend, activation):
    gate = torch.tensor([[-1e4, -90.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, 90.0, 1e4]])
    up, dproduct = torch.linspace(-2, 3, 11)[None], torch.linspace(1, 2, 11)[None]
    exact, eager = ([t.to(d).requires_grad_() for t in (gate, up)] for d in (FP64, FP32))
    for leaf in (exact, eager):
        glu_composite(*leaf, activation).backward(dproduct.to(leaf[0].dtype))
    got = _backend.implementation(backend, "glu_backward")(dproduct, gate, up, activation)
    for one, e, t in zip(got, eager, exact, strict=True):
        assert_close(one, e.grad, t.grad)


@pytest.mark.parametrize("path", PATHS)
def test_equals_three_calls_after_the_same_seed(path, device):
    block = Block(lead=(30,), ps=DROPS, bias=True)
    inputs = make(block, device, ())
    torch.manual_seed(SEED)
    y = call(path, inputs, block)
    torch.manual_seed(SEED)
    with on(path):
        gate, up, down = (
            lambda x, to=to: lora_linear(x, *to[:5], dropout_p=to.dropout_p)
            for to in projections(inputs, block)
        )
        want = down(glu_composite(gate(inputs["x"]), up(inputs["x"]), "silu"))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_training_false_switches_dropout_off(path, device):
    inputs = make(Block(), device)
    with on(path):
        off = lora_mlp(inputs["x"], *projections(inputs, Block(ps=DROPS)), training=False)
        assert torch.equal(off, lora_mlp(inputs["x"], *projections(inputs, Block())))


def saved_by(path, block, requires_grad, device):
    saved = []
    inputs = make(block, device, requires_grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(path, inputs, block)
    own = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name != "x"}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return inputs, sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_saved_are_x_gate_and_up_once_and_each_h_and_bit(path, dtype, device):
    block = Block(lead=(40,), cols=44, hidden=52, dtype=dtype, ps=DROPS)
    _, kept = saved_by(path, block, ("x", "lora_a", "lora_b"), device)
    elements = 40 * 44 + 2 * 40 * 52 + 40 * sum(block.ranks)
    assert kept == elements * dtype.itemsize + 40 * (6 + 6 + 7)


@pytest.mark.parametrize("path", PATHS)
def test_what_no_gradient_reads_is_not_saved(path, device):
    block = Block(lead=(40,), ps=DROPS)
    assert saved_by(path, block, ("down.lora_b",), device)[1] == 40 * block.ranks[2] * 4
    assert saved_by(path, block, (), device)[1] == 0


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bitwise_equal(path, device):
    block = Block(lead=(40,), ps=DROPS, dtype=BF16)
    first, second = (run(path, block, device) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_checkpoint_repeats_the_masks(path, device):
    block, found = Block(ps=DROPS), []
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        inputs = make(block, device)

        def layer(x, inputs=inputs):
            return call(path, {**inputs, "x": x}, block).square().sum()

        torch.manual_seed(1)
        with on(path):
            through(layer, inputs["x"]).backward()
        found.append([t.grad for t in inputs.values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_autocast(path, device):
    block = Block(bias=True)
    got, eager, exact = make(block, device), make(block, device), make(block, device, dtype=FP64)
    with torch.autocast(device.type, dtype=BF16):
        y = call(path, got, block)
    assert y.dtype == BF16
    half, none = {name: t.bfloat16() for name, t in eager.items()}, dict.fromkeys(PARTS)
    for each in (y, expected(half, block, none), expected(exact, block, none)):
        each.float().square().sum().backward()
    for name, leaf in got.items():
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, eager[name].grad, exact[name].grad, name, BF16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_gradcheck_twice(path, activation):
    sizes = {"lead": (2, 2), "cols": 9, "hidden": 5, "out": 3, "ranks": (2, 1, 2), "dtype": FP64}
    block = Block(**sizes, ps=DROPS, bias=True, activation=activation)
    inputs = make(block, "cpu")

    def function(*tensors):
        torch.manual_seed(SEED)
        return call(path, dict(zip(inputs, tensors, strict=True)), block)

    assert gradcheck(function, tuple(inputs.values()), fast_mode=True)
    assert gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("path", PATHS)
def test_double_backward_without_gate_and_up_says_so(path, device):
    inputs = make(Block(), device, ("down.lora_b",))
    y = call(path, inputs, Block())
    with pytest.raises(RuntimeError, match="lora_mlp: a double backward needs the outputs of gate and up"):
        torch.autograd.grad(y.sum(), inputs["down.lora_b"], create_graph=True)


def test_functional_gradients(device):
    block = Block(dtype=FP64)
    inputs, want = make(block, device, ()), make(block, device)
    expected(want, block, dict.fromkeys(PARTS)).square().sum().backward()
    grad = torch.func.grad(lambda x: call("reference", {**inputs, "x": x}, block).square().sum())
    torch.testing.assert_close(grad(inputs["x"]), want["x"].grad)


@pytest.mark.spread("backend", "ps", of=2)
@pytest.mark.parametrize("ps", ((0.0,) * 3, DROPS), ids=("plain", "dropout"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_for_any_token_count(backend, ps, device):
    torch._dynamo.reset()
    block = Block(ps=ps)
    inputs = make(block, device, ("lora_a", "lora_b"))
    adapters = [t for t in inputs.values() if t.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x):
        return call(backend, {**inputs, "x": x}, block)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with use_backend(backend):
        for rows in (7, 12, 5):
            x, found = torch.randn(rows, 24, device=device), []
            for each in (compiled, layer):
                leaf = x.clone().requires_grad_()
                torch.manual_seed(rows)
                y = each(leaf)
                found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *adapters])])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def spoilt(name, **changes):
    inputs = make(Block(), "cpu", ())
    given = dict(zip(PARTS, projections(inputs, Block()), strict=True))
    return {"x": inputs["x"], **given, name: given[name]._replace(**changes)}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation: expected one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"up": (1, 2, 3)}, TypeError, "up: expected a LoRAProjection, got tuple"),
        (spoilt("down", weight=None), TypeError, "down: weight: expected a Tensor, got NoneType"),
        (spoilt("gate", scaling="2"), TypeError, "gate: scaling: expected a number, got str"),
        (spoilt("gate", dropout_p=1.0), ValueError, "gate: dropout_p: expected 0 <= dropout_p < 1"),
        (spoilt("down", lora_a=torch.ones(5, 20)), ValueError, "down: x: expected its last dimension"),
        (spoilt("up", bias=torch.ones(3)), ValueError, "up: bias: expected"),
        (
            spoilt("up", weight=torch.ones(9, 24), lora_b=torch.ones(9, 3)),
            ValueError,
            "up: expected 21 out features, as gate has, got 9",
        ),
        (spoilt("down", weight=torch.ones(13, 21).double()), TypeError, "down: weight: expected torch.fl"),
    ],
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        lora_mlp(**{**spoilt("gate"), **given})
