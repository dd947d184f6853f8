"""``opcheck`` over every op: schema, fake kernel, autograd registration and tracing with dynamic shapes."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from lora_kernels import (
    BatchPlan,
    _backend,
    _extension,
    _fakes,
    _ops,
    plan_batch,
    quantize,
    slice_adapters,
    stack_adapters,
)
from lora_kernels.ops import _dispatch
from lora_kernels.reference.gate_chain import pairs
from lora_kernels.testing import TENSORS, LoraCase, lora_inputs

CASES = {
    "plain": LoraCase(),
    "dropout": LoraCase(dropout_p=0.25, bias=True),
    "gates": LoraCase(gate="rows", dtype=torch.bfloat16, adapter_dtype=torch.float32),
    "branch": LoraCase(weight="none", gate="rank", cols=19, dropout_p=0.5),
    "separate": LoraCase(x_lora=True, bias=True, factors="views"),
    "width": LoraCase(branch_cols=19, dropout_p=0.25),
    "empty": LoraCase(lead=(0,), bias=True),
}
NEEDS = {"all": (True,) * 5, "adapters": (False, True, True, False, False), "input": (True,) + (False,) * 4}


def seed(value=42):
    return torch.tensor([value], dtype=torch.int64)


def forward_args(case):
    inputs = lora_inputs(case)
    drawn = seed() if case.dropout_p else None
    return (*(inputs[name] for name in TENSORS), drawn, case.scaling, case.dropout_p)


def backward_args(case, needs):
    args = forward_args(case)
    x, weight, lora_a, lora_b, _, gate, x_lora = args[:7]
    _, h, mask = _backend.implementation("reference", "lora_linear")(*args)
    needs = [*needs[:3], needs[3] and gate is not None, needs[4] and x_lora is not None]
    branch = x if x_lora is None else x_lora
    tensors = (torch.randn_like(x[:, :1]).expand(-1, case.out).contiguous(), branch, weight, lora_a, lora_b)
    rest = (h, gate, mask if case.dropout_p else None, case.scaling, case.dropout_p, x_lora is not None)
    return (*tensors, *rest, needs)


def chain_args(dims=(3, 2, 2), rows=5, add=False):
    sizes = [dims[i] * dims[j] for i, j in pairs(len(dims))]
    gates = [torch.randn(size, size) for size in sizes]
    return torch.randn(rows, 13), torch.randn(rows, 11), gates, list(dims), add


def chain_backward_args(dx=True, needs=(True, True, True), rows=5):
    dy, x, gates, dims, _ = chain_args(rows=rows)
    grads = [torch.zeros_like(g) if n else g.new_empty(0) for g, n in zip(gates, needs, strict=True)]
    return dy, x, gates, dims, torch.zeros_like(x) if dx else None, True, grads


def glu_args(activation, dtype=torch.float32, rows=5):
    """A gate whose rows lie apart, and an up that is transposed."""
    return torch.randn(rows, 9)[:, :7].to(dtype), torch.randn(7, rows).to(dtype).T, activation


def multi_args(k=1, masked=False):
    stack = stack_adapters(
        [torch.randn(r, 19) for r in (3, 0, 2)], [torch.randn(11, r) for r in (3, 0, 2)], [1.0, 2.0, 0.5]
    )
    plan = plan_batch(torch.arange(5 * k) % 4 - 1, 3)
    ps = torch.full((5 * k,), 0.25)
    mask = _backend.implementation("reference", "row_dropout_mask")(seed(), ps, 19) if masked else None
    layout = (stack.a_pages, stack.b_pages, stack.pages, stack.spans, torch.rand(5 * k))
    rest = (
        plan.order,
        plan.offsets,
        plan.tiles,
        mask,
        1 / (1 - ps) if masked else None,
        stack.max_rank,
        k > 1,
    )
    return (torch.randn(5, 19), *layout, *rest)


def multi_backward_args(needs, **options):
    x, *layout, mask, keep_scale, max_rank, _ = args = multi_args(**options)
    h = _backend.implementation("reference", "multi_lora_linear")(*args[:-1], True)[1]
    return (torch.randn(5, 11), x, *layout, h, mask, keep_scale, max_rank, list(needs))


def multi_add_args(linears=1, k=1):
    stacks = [
        stack_adapters([torch.randn(r, 19) for r in ranks], [torch.randn(11, r) for r in ranks])
        for ranks in ((3, 0, 2), (1, 4, 0))[:linears]
    ]
    plan = plan_batch(torch.arange(5 * k) % 4 - 1, 3)
    names = ("a_pages", "b_pages", "pages", "spans", "scalings")
    lists = [[getattr(stack, name) for stack in stacks] for name in names]
    weights = torch.rand(5 * k) if k > 1 else None
    table = slice_adapters(*stacks).table
    return (torch.randn(5, 11 * linears), torch.randn(5, 19), *lists, weights, *plan[1:], table, 4, False)


def grouped_args(bias=False, rows=9):
    """Three experts, the second without rows, and with as many as nine rows one behind the last."""
    offsets = torch.tensor([0, 5, 5, 8]).clamp(max=rows)
    x, weight = torch.randn(rows, 7), torch.randn(3, 7, 5).mT
    return (
        x,
        weight,
        torch.randn(3, 2, 7),
        torch.randn(3, 5, 2),
        torch.randn(3, 5) if bias else None,
        offsets,
        0.5,
    )


def grouped_backward_args(needs):
    x, weight, lora_a, lora_b, _, offsets, scaling = grouped_args()
    return torch.randn(9, 5), x, weight, lora_a, lora_b, torch.randn(9, 2), offsets, scaling, list(needs)


def plan_args(slots=9):
    return (torch.tensor([2, -1, 0, 7, 2]), 3, *BatchPlan.allocate(slots, 3))


def quantized_args(format, transpose=False, **options):
    q = quantize(torch.randn(11, 19), format, **options)
    weight = (q.codes, q.scales, q.nested, q.format)
    x = torch.randn(5, 11 if transpose else 19)
    return q, weight, (torch.randn(5, 19 if transpose else 11), x, *weight, *q.shape, q.block, transpose)


def quantized_lora_args(case, **options):
    x, weight, *rest, drawn, scaling, p = forward_args(case)
    q = quantize(weight, **options)
    codes = (q.codes, q.scales, q.nested)
    return (x, *codes, *rest, drawn, q.format, q.block, scaling, p)


def dequantize_args(dtype, *args, **options):
    q, weight, _ = quantized_args(*args, **options)
    return (*weight, *q.shape, q.block, dtype)


def dora_args(case, keep_z=True):
    inputs = lora_inputs(case)
    tensors = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    drawn = seed() if case.dropout_p else None
    scale = torch.rand(case.out) + 0.5
    return (*tensors, scale, inputs["bias"], drawn, case.scaling, case.dropout_p, keep_z)


def dora_backward_args(case, needs):
    x, weight, lora_a, lora_b, scale, _, _, scaling, p, _ = args = dora_args(case)
    _, z, h, mask = _backend.implementation("reference", "dora_linear")(*args)
    rest = (scale, z, h, mask if p else None, scaling, p, list(needs))
    return (torch.randn(x.shape[0], case.out).to(x.dtype), x, weight, lora_a, lora_b, *rest)


DORA_CASES = {name: CASES[name] for name in ("plain", "dropout", "empty")}
DORA_NEEDS = {"all": (True,) * 4, "adapters": (False, True, True, False), "scale": (False,) * 3 + (True,)}


def group_args(case, ps=(0.0, 0.0)):
    members = [lora_inputs(replace(case, out=out, rank=rank), seed=out) for out, rank in ((20, 4), (9, 3))]
    lists = [[m[name] for m in members] for name in ("weight", "lora_a", "lora_b", "bias", "gate")]
    drawn = torch.tensor([3, 4]) if any(ps) else None
    return (members[0]["x"], *lists, drawn, [0.5, 2.0], list(ps))


def group_backward_args(needs, case, ps=(0.0, 0.0)):
    x, weights, lora_as, lora_bs, _, gates, _, *rest = args = group_args(case, ps)
    given = _backend.implementation("reference", "lora_linear_group")(*args)
    dys = [torch.randn_like(y) for y in given[:2]]
    masks = given[4:] if any(ps) else [None, None]
    return (dys, x, weights, lora_as, lora_bs, given[2:4], gates, masks, *rest, list(needs))


SAMPLES = {
    "low_rank_norm": {
        "plain": (torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3), 0.5),
        "half": (torch.randn(5, 7).bfloat16(), torch.randn(3, 7), torch.randn(5, 3), 0.5),
        "transposed": (torch.randn(7, 5).T, torch.randn(3, 7), torch.randn(5, 3), 0.5),
    },
    "dora_linear": {
        **{name: dora_args(case) for name, case in DORA_CASES.items()},
        "no z": dora_args(DORA_CASES["dropout"], False),
    },
    "dora_linear_backward": {
        f"{name}-{what}": dora_backward_args(case, needs)
        for name, case in DORA_CASES.items()
        for what, needs in DORA_NEEDS.items()
    },
    "lora_linear_group": {
        "plain": group_args(LoraCase()),
        "dropout": group_args(LoraCase(bias=True, dtype=torch.bfloat16), (0.2, 0.3)),
        "gates": group_args(LoraCase(gate="rows")),
    },
    "lora_linear_group_backward": {
        "plain": group_backward_args([True, *[True, True, False] * 2], LoraCase()),
        "gates": group_backward_args([True, *[True] * 6], LoraCase(gate="rank"), (0.2, 0.3)),
        "adapters": group_backward_args([False, *[True, True, False] * 2], LoraCase(), (0.2, 0.3)),
        "input": group_backward_args([True, *[False] * 6], LoraCase()),
    },
    "dequantize": {
        "nf4": dequantize_args(torch.float32, "nf4", double_quant=True),
        "int8": dequantize_args(torch.float16, "int8"),
    },
    "quantized_linear": {
        "nf4": quantized_args("nf4")[-1],
        "fp8": quantized_args("fp8", transpose=True)[-1],
    },
    "quantized_lora_linear": {
        "plain": quantized_lora_args(LoraCase()),
        "dropout": quantized_lora_args(LoraCase(dropout_p=0.25, bias=True), format="int8"),
        "width": quantized_lora_args(LoraCase(branch_cols=19, dropout_p=0.25)),
        "empty": quantized_lora_args(LoraCase(lead=(0,))),
    },
    "grouped_lora_linear": {
        "plain": grouped_args(),
        "bias": grouped_args(True),
        "empty": grouped_args(rows=0),
    },
    "grouped_lora_linear_backward": {
        "all": grouped_backward_args((True,) * 5),
        "frozen": grouped_backward_args((True, False, True, True, False)),
    },
    "glu": {name: glu_args(name) for name in _ops.ACTIVATIONS} | {"empty": glu_args("silu", rows=0)},
    "glu_backward": {
        **{name: (torch.randn(5, 7), *glu_args(name)) for name in _ops.ACTIVATIONS},
        "half": (torch.randn(7, 5).bfloat16().T, *glu_args("silu", torch.bfloat16)),
    },
    "gate_chain": {"alone": chain_args(), "added": chain_args(add=True), "empty": chain_args(rows=0)},
    "gate_chain_backward": {
        "all": chain_backward_args(),
        "some": chain_backward_args(needs=(False, True, False)),
        "gates": chain_backward_args(dx=False),
        "empty": chain_backward_args(rows=0),
    },
    "row_dropout_mask": {"odd": (seed(), torch.tensor([0.1, 0.5, 0.9]), 13)},
    "multi_lora_linear": {"one": multi_args(), "two": multi_args(2), "masked": multi_args(2, True)},
    "multi_lora_linear_backward": {
        "all": multi_backward_args((True,) * 4),
        "masked": multi_backward_args((True,) * 4, k=2, masked=True),
        "adapters": multi_backward_args((False, True, True, False)),
    },
    "invariant_linear": {
        "plain": (torch.randn(5, 7), torch.randn(3, 7)),
        "half": (torch.randn(2, 7).bfloat16(), torch.randn(7, 3).bfloat16().T),
    },
    "dropout_seed": {"cpu": (torch.ones(2, 3),)},
    "dropout_mask": {"odd": (seed(), 5, 13, 0.3), "empty": (seed(), 0, 8, 0.3)},
    "lora_linear": {name: forward_args(case) for name, case in CASES.items()},
    "lora_linear_backward": {
        f"{name}-{what}": backward_args(case, needs)
        for name, case in CASES.items()
        for what, needs in NEEDS.items()
    },
}
IN_PLACE_SAMPLES = {
    "multi_lora_linear_add": {
        "one": multi_add_args(),
        "two": multi_add_args(2),
        "mixed": multi_add_args(k=2),
    },
    "batch_plan": {"padded": plan_args(), "exact": plan_args(5)},
}
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Ops that return nothing.
FILLS = ("quantized_linear", "gate_chain", "gate_chain_backward")
# A draw differs from call to call, so what compares two calls does not apply.
RANDOM_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def params(ops, prefix=""):
    return [
        pytest.param(f"{prefix}{op}", args, id=f"{prefix}{op}-{name}")
        for op in ops
        for name, args in (SAMPLES | IN_PLACE_SAMPLES)[op].items()
    ]


def check(op, args):
    tests = RANDOM_TESTS if op == "dropout_seed" else TESTS
    torch.library.opcheck(getattr(torch.ops.lora_kernels, op).default, args, test_utils=tests)


def test_every_op_has_samples():
    assert set(SAMPLES) == set(_ops.SCHEMAS)
    assert set(_ops.CPP_OPS) <= set(SAMPLES)


@pytest.mark.parametrize(("op", "args"), params([*_ops.SCHEMAS, *IN_PLACE_SAMPLES]))
def test_opcheck(op, args):
    check(op, args)


@pytest.mark.parametrize(("op", "args"), params([*_ops.CPP_OPS, *IN_PLACE_SAMPLES], "cpp_"))
def test_opcheck_cpp(op, args):
    if reason := _extension.load():
        pytest.skip(f"cpp: {reason}")
    check(op, args)


@pytest.mark.parametrize("op", [op for op in _ops.SCHEMAS if op != "dropout_seed"])
@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_every_backend_takes_the_arguments_of_the_schema(backend, op):
    if backend == "triton" and (reason := _backend.triton_missing()):
        pytest.skip(reason)
    schema = getattr(torch.ops.lora_kernels, op).default._schema
    function = _backend.implementation(backend, op)
    assert list(inspect.signature(function).parameters) == [a.name for a in schema.arguments]
    fake = _fakes.FAKES[op]
    if fake is _fakes.in_place:  # which reads nothing of what it is given
        assert not schema.returns
    else:
        assert list(inspect.signature(fake).parameters) == [a.name for a in schema.arguments]


def layout(tensor):
    return tensor.shape, tensor.dtype, tensor.stride()


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
@pytest.mark.parametrize(
    ("op", "args"), params([op for op in _ops.SCHEMAS if op not in ("dropout_seed", *FILLS)])
)
def test_fake_kernel_tells_shape_dtype_and_strides(op, args, backend):
    reason = _backend.unavailable(backend, "cpu", torch.float32, 4)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    lead = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    if lead.shape[0] == 0 and backend == "triton":
        backend = "reference"  # where an empty batch runs: there is nothing to launch
    real = _backend.implementation(backend, op)(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, args)
        fake = _fakes.FAKES[op](*fakes)
    pairs = zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (real, fake)), strict=True)
    for number, (one, other) in enumerate(pairs):
        assert layout(one) == layout(other), f"result {number}"


def test_an_op_that_does_not_say_its_rank_is_an_error():
    with pytest.raises(NotImplementedError, match="new_op: name the argument that has its rank"):
        _dispatch._rank_reader("new_op")


RANKS = {"low_rank_norm": 3, "multi_lora_linear": 3, "multi_lora_linear_backward": 3}
RANKS |= {"grouped_lora_linear": 2, "grouped_lora_linear_backward": 2}


@pytest.mark.parametrize("op", sorted(set(_dispatch._RANKS) & set(SAMPLES | IN_PLACE_SAMPLES)))
def test_the_rank_is_read_from_the_argument_that_has_it(op):
    for args in (SAMPLES | IN_PLACE_SAMPLES)[op].values():
        assert _dispatch._READERS[op](args) == RANKS.get(op, 4)
