"""``dora_linear`` on every backend: values, gradients, dropout, layouts, second order, the compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_harness import case_id, mask_of_next_call
from torch.autograd import gradcheck, gradgradcheck

from lora_kernels import _cpu_ways, _extension, dora_linear, use_backend
from lora_kernels._arguments import DoraInputs
from lora_kernels.reference.dora_linear import composite
from lora_kernels.testing import LoraCase, assert_close, leaves, lora_inputs

BACKENDS = ("reference", "cpp", "triton")
NAMES = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")
FP32, FP64, BF16, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = [
    LoraCase(),
    LoraCase(bias=True),
    LoraCase(lead=(1,)),
    LoraCase(lead=(0,), bias=True),
    LoraCase(lead=(2, 0), dropout_p=0.3),
    LoraCase(lead=(), bias=True, dropout_p=0.3),
    LoraCase(lead=(2, 3, 4), bias=True),
    LoraCase(lead=(17,), cols=37, out=29, rank=5, bias=True, dropout_p=0.1),
    LoraCase(lead=(33,), cols=1, out=1, rank=1),
    LoraCase(x_layout="strided", dropout_p=0.2),
    LoraCase(x_layout="columns", dropout_p=0.4),
    LoraCase(lead=(3, 4), x_layout="transposed"),
    LoraCase(weight="transposed", dropout_p=0.2),
    LoraCase(factors="views"),
    LoraCase(factors="transposed", dropout_p=0.2),
    LoraCase(lead=(40,), cols=300, out=270, rank=33, bias=True, dropout_p=0.25),
    LoraCase(scaling=-2.5, cols=21, dropout_p=0.9),
]


def dora_inputs(case, device="cpu"):
    inputs = lora_inputs(case, device)
    factor = case.adapter_dtype or case.dtype
    generator = torch.Generator().manual_seed(7)
    weight, lora_a, lora_b = (inputs[n].double().cpu() for n in ("weight", "lora_a", "lora_b"))
    lengths = (weight + case.scaling * lora_b @ lora_a).norm(dim=1)
    share = 0.5 + torch.rand(case.out, generator=generator, dtype=FP64)
    inputs["magnitude"] = (lengths * share).to(device, factor)
    return {name: inputs[name] for name in NAMES}


def expected(inputs, case, mask, norm=None):
    """PEFT's formula, the norm a constant."""
    x, weight, lora_a, lora_b, magnitude, bias = (inputs[name] for name in NAMES)
    total = weight + case.scaling * (lora_b.to(weight.dtype) @ lora_a.to(weight.dtype))
    scale = magnitude.to(weight.dtype) / torch.linalg.norm(total, dim=1).detach()
    rows = x.reshape(case.rows, case.cols)
    numbers = (None, case.scaling, case.dropout_p)
    y = composite(DoraInputs(rows, weight, lora_a, lora_b, scale, bias, *numbers), mask)
    return y.view(*case.lead, case.out)


def call(backend, inputs, case):
    arguments = [inputs[name] for name in NAMES[:5]]
    with use_backend(backend):
        return dora_linear(*arguments, case.scaling, inputs["bias"], dropout_p=case.dropout_p)


def run(y, inputs, wanted, dy):
    grads = torch.autograd.grad(y, [inputs[n] for n in wanted], dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def check(backend, case, device, wanted=None, ulps=0.5):
    given_ = dora_inputs(case, device)
    wanted = [n for n in NAMES if given_[n] is not None] if wanted is None else wanted
    dy = torch.randn(*case.lead, case.out, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    mask = mask_of_next_call(case, device)
    inputs, plain, wide = (leaves(given_, wanted, dtype) for dtype in (None, None, FP64))
    got = run(call(backend, inputs, case), inputs, wanted, dy)
    eager = run(expected(plain, case, mask), plain, wanted, dy)
    exact = run(expected(wide, case, mask), wide, wanted, dy.double())
    for name, value in got.items():
        if name != "y":
            assert value.dtype == inputs[name].dtype
        assert_close(value, eager[name], exact[name], name, case.dtype, ulps)


@pytest.mark.parametrize("dtype", (FP32, FP64, BF16, HALF), ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_case(backend, case, dtype, device):
    check(backend, replace(case, dtype=dtype), device)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case_triton(case, device):
    check("triton", replace(case, dtype=(FP32, BF16, HALF)[CASES.index(case) % 3]), device)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_adapters_on_a_half_base(backend, dropout_p, device):
    check(backend, LoraCase(dtype=BF16, adapter_dtype=FP32, bias=True, dropout_p=dropout_p), device)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize(
    "wanted", [(n,) for n in NAMES] + [(), ("x", "lora_b"), ("lora_a", "magnitude")], ids="+".join
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, wanted, dropout_p, device):
    check(backend, LoraCase(bias=True, dropout_p=dropout_p), device, wanted)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    # With one column a row is one number, which sBA may undo but for its last digits.
    cols=st.integers(4, 300),
    out=st.integers(1, 300),
    rank=st.integers(1, 20),
    dropout_p=st.sampled_from((0.0, 0.1, 0.6)),
)
def test_any_shape(rows, cols, out, rank, dropout_p):
    case = LoraCase(lead=(rows,), cols=cols, out=out, rank=rank, dropout_p=dropout_p, bias=True)
    check("cpp", case, torch.device("cpu"), ulps=4.0)


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_first_and_second_derivatives(backend, dropout_p):
    """The norm is a constant in the first; so the scale is what is varied here, not A and B alone."""
    from lora_kernels.ops.dora_linear import _DoRALinear

    case = LoraCase(lead=(3,), cols=9, out=4, rank=2, dtype=FP64, bias=True, dropout_p=dropout_p)
    inputs = dora_inputs(case)
    tensors = [inputs[name].requires_grad_() for name in NAMES]

    def function(*tensors):
        torch.manual_seed(0)
        with use_backend(backend):
            return _DoRALinear.apply(*tensors, None, case.scaling, dropout_p)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_magnitude_zero(backend):
    case = LoraCase(bias=True)
    inputs = leaves(dora_inputs(case), ("magnitude",))
    with torch.no_grad():
        inputs["magnitude"][3] = 0
    y = call(backend, inputs, case)
    assert torch.equal(y[:, 3], inputs["bias"][3].expand(case.rows))
    y.sum().backward()
    exact = (inputs["x"] @ (inputs["weight"] + case.scaling * inputs["lora_b"] @ inputs["lora_a"]).T).sum(0)
    norm = (inputs["weight"] + case.scaling * inputs["lora_b"] @ inputs["lora_a"]).norm(dim=1)
    torch.testing.assert_close(inputs["magnitude"].grad, exact / norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_checkpointed(backend, device):
    case = LoraCase(bias=True, dropout_p=0.3)
    wanted, found = ("x", "lora_a", "lora_b", "magnitude"), []

    def layer(*tensors):
        return dora_linear(*tensors[:5], 0.75, tensors[5], dropout_p=0.3)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(layer, *tensors, use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for function in (layer, compiled, checkpointed):
            inputs = leaves(dora_inputs(case, device), wanted)
            torch.manual_seed(3)
            y = function(*inputs.values())
            y.square().sum().backward()
            found.append([y.detach(), *(inputs[n].grad for n in wanted)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_func_transforms():
    case = LoraCase(bias=True)
    inputs = dora_inputs(case)
    arguments = list(inputs.values())

    def loss(lora_b):
        return dora_linear(*arguments[:3], lora_b, arguments[4], 0.75, arguments[5]).square().sum()

    inputs = leaves(inputs, ("lora_b",))
    call("auto", inputs, case).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(inputs["lora_b"].detach()), inputs["lora_b"].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, device):
    case = LoraCase(bias=True)
    inputs = leaves(dora_inputs(case, device), ("x", "lora_a", "magnitude"))
    with torch.autocast(device.type, dtype=BF16):
        y = call(backend, inputs, case)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert all(inputs[n].grad.dtype == FP32 for n in ("x", "lora_a", "magnitude"))


def test_evaluation_has_no_dropout_and_saves_no_z():
    inputs = leaves(dora_inputs(LoraCase()), ("lora_a",))
    tensors = [inputs[name] for name in NAMES[:5]]
    y = dora_linear(*tensors, 0.75, dropout_p=0.5, training=False)
    assert torch.equal(y, dora_linear(*tensors, 0.75))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        dora_linear(*tensors, 0.75)
    assert (7, 20) not in kept


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"magnitude": torch.ones(3)}, ValueError, "magnitude: expected"),
        ({"magnitude": 1.0}, TypeError, "magnitude: expected a Tensor"),
        ({"magnitude": torch.ones(20, dtype=torch.int64)}, TypeError, "magnitude: expected a floating"),
        ({"magnitude": torch.ones(20, device="meta")}, ValueError, "magnitude: expected device"),
        ({"weight": None}, TypeError, "weight: expected a Tensor"),
        ({"lora_b": torch.ones(19, 4)}, ValueError, "weight: expected"),
        ({"scaling": torch.ones(1)}, TypeError, "scaling: expected a number"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    ],
)
def test_bad_arguments(change, error, match):
    inputs = {**dora_inputs(LoraCase()), "scaling": 0.75, "dropout_p": 0.0, **change}
    with pytest.raises(error, match=match):
        dora_linear(**inputs)


@pytest.mark.parametrize("cols,out", [(128, 64), (300, 70), (1, 129), (513, 5)])
@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.2])
def test_sparse_second_product(dropout_p, cols, out):
    """From 32 rows on and for a small p the C++ kernels multiply only what was dropped."""
    case = LoraCase(lead=(33,), cols=cols, out=out, rank=3, bias=True, dropout_p=dropout_p)
    check("cpp", case, torch.device("cpu"), ulps=4.0)
    check("cpp", replace(case, lead=(530,)), torch.device("cpu"), ulps=4.0)


@pytest.mark.parametrize("rows,cols,out,rank", [(1100, 40, 300, 5), (530, 70, 17, 33), (70, 300, 600, 70)])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_one_pass_over_dy(dtype, rows, cols, out, rank):
    """More rows than one chain of additions has, and ranks of several vectors."""
    case = LoraCase(lead=(rows,), cols=cols, out=out, rank=rank, bias=True, dtype=dtype)
    check("cpp", case, torch.device("cpu"), ulps=4.0)
    check("cpp", case, torch.device("cpu"), ("lora_a", "lora_b"), ulps=4.0)


@pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
@pytest.mark.parametrize("case", [c for c in CASES if c.rows > 0], ids=case_id)
@pytest.mark.parametrize("multiplier", ("panels", "vendor"))
def test_each_multiplier(multiplier, case):
    """Whoever multiplies: without dropout, with the dense second product and with the sparse one."""
    with _cpu_ways.forced(multiplier):
        for dropout_p in {0.0, case.dropout_p, 0.15}:
            check("cpp", replace(case, dropout_p=dropout_p), torch.device("cpu"))


# Not 0.1, where the second product is the vendor's sparse one.
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_results_do_not_depend_on_the_threads(dropout_p):
    """With our products: a vendor's may split a sum by threads, as MKL's for AVX2 do."""
    case, found = LoraCase(lead=(700,), cols=200, out=300, dropout_p=dropout_p), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            inputs = leaves(dora_inputs(case), ("x", "lora_a", "lora_b", "magnitude"))
            with _cpu_ways.forced("panels"):
                y = call("cpp", inputs, case)
                y.sum().backward()
            found.append([y, inputs["magnitude"].grad, inputs["lora_a"].grad, inputs["lora_b"].grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
