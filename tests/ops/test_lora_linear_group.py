"""``lora_linear_group`` on every backend: the values, gradients and masks of separate linears."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_harness import CPU_PATHS, PATHS, SEED, on, skip_unavailable
from torch.utils.checkpoint import checkpoint

from lora_kernels import dequantize, lora_linear, lora_linear_group, quantize
from lora_kernels._arguments import LoraInputs
from lora_kernels.reference.dropout import dropout_mask
from lora_kernels.reference.lora_linear import composite
from lora_kernels.testing import LoraCase, assert_close, leaves, lora_inputs

BACKENDS = ("reference", "cpp", "triton")
FP32, BF16, HALF, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FP32, BF16, HALF, FP64)
# The tensors of one member.
OWN = ("weight", "lora_a", "lora_b", "bias", "gate")


PLAIN = LoraCase()


@dataclass(frozen=True)
class Group:
    """The members share ``case``'s x; each has its own out size, rank and probability."""

    case: LoraCase = PLAIN
    outs: tuple[int, ...] = (20, 8, 13)
    ranks: tuple[int, ...] = (4, 4, 4)
    ps: tuple[float, ...] = (0.0, 0.0, 0.0)
    scalings: tuple[float, ...] = (0.75, 2.0, -1.5)

    def members(self):
        sizes = zip(self.outs, self.ranks, self.ps, self.scalings, strict=False)
        return [replace(self.case, out=n, rank=r, dropout_p=p, scaling=s) for n, r, p, s in sizes]


def make(group, device, requires_grad=("x", *OWN), dtype=None):
    """{"x": …, "weight0": …, …} as leaves."""
    given = {}
    for i, case in enumerate(group.members()):
        own = lora_inputs(case, device, seed=i)
        given.setdefault("x", own["x"])
        given |= {f"{name}{i}": own[name] for name in OWN}
    wanted = [name for name in given if name in requires_grad or name.rstrip("0123456789") in requires_grad]
    return leaves(given, wanted, dtype)


def part(inputs, group, name):
    return [inputs[f"{name}{i}"] for i in range(len(group.outs))]


def call(path, inputs, group):
    with on(path):
        return lora_linear_group(
            inputs["x"],
            *(part(inputs, group, name) for name in ("weight", "lora_a", "lora_b")),
            group.scalings[: len(group.outs)],
            part(inputs, group, "bias"),
            dropout_p=group.ps[: len(group.outs)],
            gates=part(inputs, group, "gate"),
        )


def masks_of_next_call(group, device):
    """The keep bits that separate calls would draw after ``manual_seed(SEED)``, and that seed set again."""
    torch.manual_seed(SEED)
    masks = []
    for case in group.members():
        drawn = torch.empty(1, dtype=torch.int64, device=device).random_() if case.dropout_p else None
        masks.append(dropout_mask(drawn, case.rows, case.cols, case.dropout_p) if case.dropout_p else None)
    torch.manual_seed(SEED)
    return masks


def expected(inputs, group, masks):
    ys = []
    for i, case in enumerate(group.members()):
        own = {name: inputs[f"{name}{i}"] for name in OWN}
        gate = own["gate"]
        own["gate"] = gate if gate is None or gate.dim() == 1 else gate.reshape(-1, gate.shape[-1])
        x = inputs["x"].reshape(case.rows, case.cols)
        numbers = {"scaling": case.scaling, "dropout_p": case.dropout_p}
        y = composite(LoraInputs(x, **own, **numbers), masks[i])
        ys.append(y.view(*case.lead, case.out))
    return ys


def backward(ys, dys):
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))


def quantise(formats, *results):
    """Quantises the weights that have a format: the first result gets codes, the others what they mean."""
    for i, format in enumerate(formats):
        if format is not None:
            q = quantize(results[0][f"weight{i}"].detach(), format)
            for inputs in results:
                dense = inputs is not results[0]
                inputs[f"weight{i}"] = dequantize(q, inputs["x"].dtype) if dense else q


def run_group(path, group, device, requires_grad=("x", *OWN), used=None, ulps=0.5, formats=()):
    for case in group.members():
        skip_unavailable(path, case, device)
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(*case.lead, case.out, generator=generator).to(device) for case in group.members()]
    dys = [dy if used is None or i in used else None for i, dy in enumerate(dys)]
    masks = masks_of_next_call(group, device)
    got, eager = (make(group, device, requires_grad) for _ in range(2))
    exact = make(group, device, requires_grad, FP64)
    quantise(formats, got, eager, exact)
    results = call(path, got, group), expected(eager, group, masks), expected(exact, group, masks)
    for ys in results:
        backward(ys, dys)
    for i, ys in enumerate(zip(*results, strict=True)):
        assert ys[0].dtype == group.case.dtype and ys[0].shape == ys[2].shape
        assert_close(*ys, f"y{i}", group.case.dtype, ulps)
    tensors = {name: t for name, t in got.items() if t is None or isinstance(t, torch.Tensor)}
    for name, leaf in tensors.items():
        grads = [None if t[name] is None else t[name].grad for t in (got, eager, exact)]
        if grads[2] is None:
            assert grads[0] is None, f"{name} got a gradient that nothing asked for"
            continue
        assert grads[0] is not None, f"{name} got no gradient"
        assert grads[0].dtype == leaf.dtype
        assert_close(*grads, name, group.case.dtype, ulps)
    return [*results[0], *(t.grad for t in tensors.values() if t is not None)]


DROPS = (0.3, 0.3, 0.3)
VARIANTS = {
    "plain": Group(),
    "dropout": Group(ps=DROPS),
    "each its own p": Group(ps=(0.1, 0.5, 0.3), ranks=(4, 9, 2)),
    "one without dropout": Group(ps=(0.2, 0.0, 0.4), scalings=(1.0, 1.0, 1.0)),
    "three dimensions": Group(LoraCase(lead=(2, 5), bias=True), ps=DROPS),
    "row gates": Group(LoraCase(lead=(2, 3), bias=True, gate="rows"), ranks=(3, 5, 1)),
    "rank gates": Group(LoraCase(gate="rank"), ps=DROPS),
    "a pair": Group(LoraCase(cols=37, bias=True), outs=(29, 31), ranks=(5, 5), ps=(0.4, 0.4)),
    "one": Group(outs=(9,), ranks=(3,), ps=(0.2,)),
    "four": Group(outs=(5, 6, 7, 8), ranks=(2, 3, 4, 5), ps=(0.1,) * 4, scalings=(1.0,) * 4),
    "wide ranks": Group(LoraCase(lead=(9,), cols=40), ranks=(64, 33, 17), ps=(0.1,) * 3),
    "wider than one launch": Group(LoraCase(lead=(5,), cols=16, bias=True), ranks=(128, 100, 3), ps=DROPS),
    "stacked to 48": Group(LoraCase(lead=(21,), cols=300), ranks=(16, 16, 16)),
    "one row": Group(LoraCase(lead=())),
    "no rows": Group(LoraCase(lead=(0,), bias=True), ps=DROPS),
    "columns": Group(LoraCase(x_layout="columns"), ps=DROPS),
    "transposed": Group(LoraCase(lead=(3, 4), x_layout="transposed", factors="transposed")),
    "views": Group(LoraCase(factors="views", weight="transposed", x_layout="strided"), ps=DROPS),
    "many rows": Group(LoraCase(lead=(70,), cols=72), ps=DROPS),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_variant(path, name, dtype, device):
    group = VARIANTS[name]
    run_group(path, replace(group, case=replace(group.case, dtype=dtype)), device)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_triton(name, device):
    group = VARIANTS[name]
    dtype = DTYPES[list(VARIANTS).index(name) % 3]
    run_group("triton", replace(group, case=replace(group.case, dtype=dtype)), device)


@pytest.mark.parametrize("path", PATHS)
def test_float32_adapters_on_a_half_base(path, device):
    run_group(path, Group(LoraCase(dtype=BF16, adapter_dtype=FP32, gate="rank"), ps=DROPS), device)


QUANTISED = {
    "plain": (Group(), ("nf4", "int8", "fp8")),
    "dropout": (Group(LoraCase(bias=True, gate="rank"), ps=DROPS), ("nf4", "nf4", "nf4")),
    "one dense": (Group(LoraCase(lead=(2, 21), cols=40, bias=True), ps=DROPS), ("nf4", None, "int8")),
    "half": (Group(LoraCase(lead=(40,), dtype=BF16, bias=True), ps=(0.2, 0.0, 0.4)), ("nf4", "nf4", "fp8")),
    "half, one dense": (Group(LoraCase(dtype=HALF)), (None, "nf4", "int8")),
    "double": (Group(LoraCase(dtype=FP64), ps=DROPS), ("nf4", "int8", "fp8")),
    "no rows": (Group(LoraCase(lead=(0,))), ("nf4", "nf4", "nf4")),
    "one": (Group(outs=(9,), ranks=(3,), ps=(0.2,)), ("nf4",)),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("path", PATHS)
def test_quantised_weights(path, name, device):
    group, formats = QUANTISED[name]
    run_group(path, group, device, formats=formats)


@pytest.mark.parametrize(
    "subset", (("x",), ("lora_a", "lora_b"), ("x", "lora_a0", "bias1"), ()), ids="+".join
)
@pytest.mark.parametrize("path", PATHS)
def test_quantised_weights_and_some_gradients(path, subset, device):
    formats = ("nf4", None, "int8")
    run_group(path, Group(LoraCase(bias=True), ps=DROPS), device, subset, (0, 1), formats=formats)


SUBSETS = [
    (),
    ("x",),
    ("lora_a", "lora_b"),
    ("x", "lora_b"),
    ("lora_b",),
    ("weight", "bias"),
    ("x", "lora_a0", "lora_b2"),
    ("lora_a1",),
    ("gate1", "weight2", "bias0"),
]


@pytest.mark.parametrize("ps", ((0.0,) * 3, DROPS), ids=("plain", "dropout"))
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("path", PATHS)
def test_requires_grad_subset(path, subset, ps, device):
    run_group(path, Group(LoraCase(bias=True, gate="rank"), ps=ps), device, subset)


@pytest.mark.parametrize("used", ((0,), (2,), (0, 2), ()), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_unused_outputs_take_no_part_in_the_backward_pass(path, used, device):
    run_group(path, Group(LoraCase(gate="rank", bias=True), ps=DROPS, ranks=(4, 2, 3)), device, used=used)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    path=st.sampled_from(CPU_PATHS),
    lead=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    cols=st.integers(1, 70),
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from((0.0, 0.2, 0.6))),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    gate=st.sampled_from(("none", "rank", "rows")),
    x_layout=st.sampled_from(("dense", "strided", "columns", "transposed")),
)
def test_any_shape(path, lead, cols, sizes, dtype, bias, gate, x_layout):
    case = LoraCase(lead=lead, cols=cols, dtype=dtype, bias=bias, gate=gate, x_layout=x_layout)
    outs, ranks, ps = zip(*sizes, strict=True)
    group = Group(case, outs, ranks, ps, (0.5,) * len(sizes))
    run_group(path, group, torch.device("cpu"), ulps=2.0)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bitwise_equal(path, device):
    group = Group(LoraCase(lead=(40,), cols=72, dtype=BF16), ps=DROPS)
    first, second = (run_group(path, group, device) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True) if pair[0] is not None)


@pytest.mark.parametrize("ps", ((0.0,) * 3, (0.2, 0.0, 0.4)), ids=("plain", "dropout"))
@pytest.mark.parametrize("path", PATHS)
def test_equals_separate_calls_after_the_same_seed(path, ps, device):
    group = Group(LoraCase(lead=(30,), cols=40, bias=True), ps=ps)
    inputs = make(group, device)
    torch.manual_seed(SEED)
    ys = call(path, inputs, group)
    torch.manual_seed(SEED)
    with on(path):
        for i, case in enumerate(group.members()):
            own = [inputs[f"{name}{i}"] for name in ("weight", "lora_a", "lora_b")]
            y = lora_linear(*(inputs["x"], *own, case.scaling, inputs[f"bias{i}"]), dropout_p=case.dropout_p)
            torch.testing.assert_close(ys[i], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ps", ((0.0,) * 3, DROPS), ids=("plain", "dropout"))
@pytest.mark.parametrize("dtype", (FP64, BF16), ids=str)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_quantised_is_separate_calls_and_keeps_no_more(path, dtype, ps, device):
    group, found = Group(LoraCase(lead=(40,), cols=64, dtype=dtype), ps=ps), []
    inputs = make(group, device)
    quantise(("nf4",) * 3, inputs)

    def separate():
        owns = [[inputs[f"{name}{i}"] for name in ("weight", "lora_a", "lora_b")] for i in range(3)]
        members = zip(owns, group.scalings, group.ps, strict=True)
        return [lora_linear(inputs["x"], *own, s, dropout_p=p) for own, s, p in members]

    for run in (lambda: call(path, inputs, group), separate):
        torch.manual_seed(SEED)
        kept = {}
        with (
            on(path),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
            ),
        ):
            ys = run()
        wanted = [inputs["x"], *part(inputs, group, "lora_a"), *part(inputs, group, "lora_b")]
        grads = torch.autograd.grad(sum(y.float().square().sum() for y in ys), wanted)
        found.append((sum(t.untyped_storage().nbytes() for t in kept.values()), [*ys, *grads]))
    (ours, got), (theirs, want) = found
    assert ours <= theirs
    for one, other in zip(got, want, strict=True) if dtype == FP64 else ():
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", PATHS)
def test_training_false_switches_dropout_off(path, device):
    inputs = make(Group(), device)
    args = [inputs["x"], *(part(inputs, Group(), name) for name in ("weight", "lora_a", "lora_b"))]
    with on(path):
        off, none = lora_linear_group(*args, dropout_p=0.5, training=False), lora_linear_group(*args)
    assert all(torch.equal(*pair) for pair in zip(off, none, strict=True))


def saved_by(path, group, requires_grad, device):
    saved = []
    inputs = make(group, device, requires_grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = call(path, inputs, group)
    return inputs, ys, {t.untyped_storage().data_ptr(): t for t in saved}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_saved_bytes_are_x_once_and_each_h_and_bit(path, dtype, device):
    group = Group(LoraCase(lead=(40,), cols=44, dtype=dtype), ps=DROPS)
    inputs, _, saved = saved_by(path, group, ("x", "lora_a", "lora_b"), device)
    own = {t.untyped_storage().data_ptr() for n, t in inputs.items() if t is not None and n != "x"}
    kept = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
    assert kept == (40 * 44 + 3 * 40 * 4) * dtype.itemsize + 3 * 40 * 6


@pytest.mark.parametrize("path", PATHS)
def test_what_is_frozen_is_not_saved(path, device):
    group = Group(ps=DROPS)
    inputs, _, saved = saved_by(path, group, ("lora_b",), device)
    assert inputs["x"].untyped_storage().data_ptr() not in saved
    assert inputs["weight0"].untyped_storage().data_ptr() not in saved
    assert not any(t.dtype == torch.uint8 for t in saved.values())
    _, ys, saved = saved_by(path, group, (), device)
    assert not saved and not any(y.requires_grad for y in ys)


@pytest.mark.parametrize("path", PATHS)
def test_checkpoint_repeats_the_masks(path, device):
    group, found = Group(ps=DROPS), []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        inputs = make(group, device)

        def layer(x, inputs=inputs):
            return sum(y.square().sum() for y in call(path, {**inputs, "x": x}, group))

        torch.manual_seed(1)
        with on(path):
            run(layer, inputs["x"]).backward()
        found.append([t.grad for t in inputs.values() if t is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("formats", ((), ("nf4", "int8", None)), ids=("dense", "quantised"))
@pytest.mark.parametrize("path", PATHS)
def test_autocast(path, formats, device):
    group = Group(LoraCase(bias=True, gate="rank"))
    got, eager = make(group, device), make(group, device)
    exact = make(group, device, dtype=FP64)
    quantise(formats, got, eager, exact)
    with torch.autocast(device.type, dtype=BF16):
        ys = call(path, got, group)
    half = {name: None if t is None else t.bfloat16() for name, t in eager.items()}
    results = ys, expected(half, group, [None] * 3), expected(exact, group, [None] * 3)
    assert all(y.dtype == BF16 for y in ys)
    for each in results:
        sum(y.float().square().sum() for y in each).backward()
    for name, leaf in got.items():
        if isinstance(leaf, torch.Tensor):
            assert leaf.grad.dtype == leaf.dtype
            assert_close(leaf.grad, eager[name].grad, exact[name].grad, name, BF16)
