"""Every version of the C++ loops that this processor can run, through the ops, and how one is chosen."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from lora_linear_harness import case_id, run_case
from test_lora_linear_group import Group, run_group

from lora_kernels import (
    _cpu_version,
    _cpu_ways,
    _extension,
    dequantize,
    dora_linear,
    lora_linear,
    multi_lora_linear,
    quantize,
    quantized_linear,
    stack_adapters,
    use_backend,
)
from lora_kernels.reference.dropout import dropout_mask
from lora_kernels.testing import LoraCase, assert_close

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")
CPU = torch.device("cpu")


def native():
    return importlib.import_module("lora_kernels._C")


VERSIONS = native().cpu_versions() if _extension.load() is None else ()


@pytest.fixture(params=VERSIONS)
def version(request):
    native().use_cpu_version(VERSIONS.index(request.param))
    yield request.param
    _cpu_version.settle()


CASES = [
    LoraCase(lead=(1,), cols=70, out=33, rank=1, bias=True),
    LoraCase(lead=(13,), cols=300, out=70, rank=16, gate="rows"),
    LoraCase(lead=(21,), cols=530, out=64, rank=70, bias=True),
    LoraCase(lead=(9,), cols=65, out=40, rank=5, dtype=torch.float64),
    LoraCase(lead=(9,), cols=65, out=40, rank=5, dtype=torch.bfloat16),
    LoraCase(lead=(9,), cols=65, out=40, rank=5, dtype=torch.float16),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("products", ["vendor", "panels"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_linear(version, case, products, dropout_p):
    with _cpu_ways.forced(products):
        run_case("cpp", replace(case, dropout_p=dropout_p), CPU)


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.2)])
def test_a_group(version, ps):
    run_group("cpp", Group(LoraCase(lead=(30,), cols=90, bias=True), ps=ps), CPU)


def test_the_mask_is_the_same(version):
    seed = torch.tensor([7])
    with use_backend("cpp"):
        bits = torch.ops.lora_kernels.cpp_dropout_mask(seed, 5, 203, 0.25)
    assert torch.equal(bits, dropout_mask(seed, 5, 203, 0.25))


def grads(call, *leaves):
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    y = call(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_dora(version, dtype, dropout_p):
    x, weight = torch.randn(40, 150, dtype=dtype), torch.randn(70, 150, dtype=dtype)
    lora_a, lora_b = torch.randn(5, 150, dtype=dtype) / 12, torch.randn(70, 5, dtype=dtype)
    factors = lora_a, lora_b, torch.rand(70, dtype=dtype) + 1

    def run(backend):
        torch.manual_seed(3)
        with use_backend(backend):
            return grads(lambda *f: dora_linear(x, weight, *f, 2.0, dropout_p=dropout_p), *factors)

    for got, expected in zip(run("cpp"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_adapters(version, dtype):
    x, weight = torch.randn(9, 90, dtype=dtype), torch.randn(50, 90, dtype=dtype)
    ranks = (4, 16, 7)
    factors = [torch.randn(r, 90, dtype=dtype) for r in ranks]
    factors += [torch.randn(50, r, dtype=dtype) for r in ranks]
    ids = torch.tensor([2, -1, 0, 0, 1, 0, 0, 0, 1])

    def run(backend):
        with use_backend(backend):
            return grads(
                lambda *f: multi_lora_linear(
                    x, weight, stack_adapters(f[:3], f[3:], scalings=[1.0, 0.5, 2.0]), ids
                ),
                *factors,
            )

    for got, expected in zip(run("cpp"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-2)


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_quantised_weight(version, form, rows):
    weight = quantize(torch.randn(96, 320), form)
    x, lora_a, lora_b = torch.randn(rows, 320), torch.randn(8, 320), torch.randn(96, 8)

    def run(backend):
        with use_backend(backend):
            return lora_linear(x, weight, lora_a, lora_b, scaling=2.0)

    torch.testing.assert_close(run("cpp"), run("reference"), rtol=2e-4, atol=2e-3)


QUANTISED = {
    "nf4": {},
    "nf4 of short blocks": {"block_size": 32},
    "nf4 of long blocks": {"block_size": 256},
    "nf4 of codes of scales": {"double_quant": True},
    "int8": {},
    "fp8": {},
    "fp8 of one scale": {"per_tensor": True},
}


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("shape", [(9, 384), (5, 192), (6, 1408), (7, 201), (3, 32), (1, 128)], ids=str)
def test_a_few_rows_with_a_quantised_weight(version, form, shape):
    """Widths that are whole chunks of codes and widths that are not, one row and several."""
    weight = quantize(torch.randn(shape), form.split()[0], **QUANTISED[form])
    dense = dequantize(weight, torch.float64)
    with use_backend("cpp"):
        for rows in (1, 2, 17):
            x = torch.randn(rows, shape[1])
            got = quantized_linear(x, weight)
            assert_close(got, x @ dense.float().T, x.double() @ dense.T)


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_the_sums_of_long_quantised_rows(version, form):
    """Of one sign: a chain of additions over a whole row is off by more than twice what a GEMM is."""
    weight = quantize(torch.rand(24, 2**15), form)
    dense = dequantize(weight, torch.float64)
    with use_backend("cpp"):
        for rows in (1, 16):
            x = torch.rand(rows, 2**15)
            assert_close(quantized_linear(x, weight), x @ dense.float().T, x.double() @ dense.T)


@pytest.fixture
def loaded(after_torch):
    code = "from lora_kernels import _extension as e; print(e.load()); import lora_kernels._C as c"
    return lambda value: after_torch(f"{code}; print(c.cpu_version())", LORA_KERNELS_CPU_VERSION=value)


def test_the_environment_chooses(loaded):
    narrowest = VERSIONS[-1]
    assert loaded(narrowest).stdout.split() == ["None", narrowest]


def test_what_the_processor_does_not_have_is_an_error(loaded):
    done = loaded("altivec")
    expected = f"LORA_KERNELS_CPU_VERSION: expected auto or what this processor has, {', '.join(VERSIONS)}"
    assert done.returncode != 0 and f"{expected}, got 'altivec'" in done.stderr
