"""The extension's own matrix products, forced, at sizes around every cut that they make."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from lora_linear_harness import case_id, run_case
from test_lora_linear_group import Group, run_group

from lora_kernels import _cpu_ways, _extension, lora_linear, lora_linear_group, use_backend
from lora_kernels.testing import LoraCase, assert_close, leaves, lora_inputs

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def way():
    with _cpu_ways.forced("panels"):
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


CASES = [
    LoraCase(),
    LoraCase(lead=(0,)),
    LoraCase(lead=(8,), cols=16, out=32, rank=1),
    LoraCase(lead=(9,), cols=17, out=33, rank=3, bias=True),
    LoraCase(lead=(2, 13), cols=35, out=161, rank=5, bias=True, gate="rows"),
    LoraCase(lead=(25,), cols=257, out=70, rank=16, gate="rank"),
    LoraCase(lead=(23,), cols=530, out=64, rank=100, bias=True),
    LoraCase(lead=(21,), cols=300, out=290, rank=256),
    LoraCase(lead=(1030,), cols=40, out=36, rank=4, bias=True),
    LoraCase(lead=(20,), cols=70, out=50, weight="transposed"),
    LoraCase(lead=(20,), cols=70, out=50, x_layout="strided", factors="views"),
    LoraCase(lead=(20,), cols=70, out=50, x_layout="columns", factors="transposed"),
    LoraCase(lead=(12,), x_lora=True, gate="rows"),
    LoraCase(lead=(12,), weight="none", bias=True),
    LoraCase(lead=(12,), scaling=-2.5),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("path", ["cpp", "cpp-function"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_linear(case, path, dropout_p):
    run_case(path, replace(case, dropout_p=dropout_p), CPU)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_linear_by_pytorchs_products(case, dtype, dropout_p):
    with _cpu_ways.forced("torch"):
        run_case("cpp", replace(case, dropout_p=dropout_p, dtype=dtype), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_the_vendors(dtype):
    run_case("cpp", LoraCase(lead=(20,), dtype=dtype), CPU)


GROUPS = {
    "plain": Group(),
    "different sizes": Group(LoraCase(lead=(30,), cols=90, bias=True), outs=(64, 33, 5), ranks=(4, 16, 40)),
    "gates": Group(LoraCase(lead=(2, 9), gate="rows"), outs=(40, 8, 70), ranks=(3, 5, 1)),
    "dropout": Group(LoraCase(lead=(30,)), ps=(0.3, 0.0, 0.2)),
    "more rows than at once": Group(LoraCase(lead=(1030,), cols=24), ranks=(2, 2, 2)),
    "long": Group(LoraCase(lead=(10,), cols=700), outs=(300, 40, 290), ranks=(64, 64, 64)),
}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_groups(group):
    run_group("cpp", group, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["vendor", "torch"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_groups_by_other_products(group, way, dtype):
    with _cpu_ways.forced(way):
        run_group("cpp", replace(group, case=replace(group.case, dtype=dtype)), CPU)


@pytest.mark.parametrize("ps", [(0.0,) * 3, (0.3,) * 3], ids=["plain", "dropout"])
def test_each_way_of_a_group_is_another(ps):
    """That a way is taken shows in the last bits alone."""
    group, found = Group(LoraCase(lead=(200,), cols=300), (250, 90, 130), ps=ps), []
    for way in _cpu_ways.WAYS:
        with _cpu_ways.forced(way):
            found.append(torch.cat([t.flatten() for t in run_group("cpp", group, CPU) if t is not None]))
    assert not any(torch.equal(*pair) for pair in itertools.combinations(found, 2))


def _outputs_and_gradients(count, threads):
    threads(count)
    inputs = leaves(lora_inputs(LoraCase(lead=(333,), cols=300, out=200, rank=9, bias=True)), ("x", "lora_a"))
    own = [inputs[name] for name in ("weight", "lora_a", "lora_b")]
    one = lora_linear(inputs["x"], *own, bias=inputs["bias"])
    two = lora_linear_group(inputs["x"], *([part, part] for part in own))
    torch.autograd.backward([one.square().sum(), *(y.square().sum() for y in two)])
    return [one.detach(), *(y.detach() for y in two), inputs["x"].grad, inputs["lora_a"].grad]


def test_nothing_depends_on_threads(threads):
    with use_backend("cpp"):
        runs = [_outputs_and_gradients(count, threads) for count in (1, 3, 16)]
    for tensors in zip(*runs, strict=True):
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])


def test_a_row_does_not_depend_on_the_others():
    inputs = lora_inputs(LoraCase(lead=(70,), cols=90, out=75))
    own = [inputs[name] for name in ("weight", "lora_a", "lora_b")]
    with use_backend("cpp"):
        whole = lora_linear(inputs["x"], *own)
        for rows in (slice(0, 1), slice(3, 12), slice(64, 70)):
            assert torch.equal(lora_linear(inputs["x"][rows], *own), whole[rows])


def test_the_vendors_products_and_ours_agree():
    inputs = lora_inputs(LoraCase(lead=(64,), cols=512, out=512, rank=8, bias=True))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    wide = lora_linear(*(arg.double() for arg in args), 1.0, inputs["bias"].double())
    with use_backend("cpp"):
        ours = lora_linear(*args, 1.0, inputs["bias"])
        with _cpu_ways.forced("vendor"):
            vendors = lora_linear(*args, 1.0, inputs["bias"])
    assert not torch.equal(ours, vendors), "both came from the same loops"
    assert_close(ours, vendors, wide)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="LORA_KERNELS_CPU_PRODUCTS: expected one of auto, panels, vendor"):
        _cpu_ways.force("mkl")
