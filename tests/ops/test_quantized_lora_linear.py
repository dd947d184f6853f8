"""``lora_linear`` over a quantised weight: numbers, memory, compilation and errors on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_linear_harness import case_id, compare, expected, mask_of_next_call, results, skip_unavailable
from torch.utils.checkpoint import checkpoint

from lora_kernels import _cpu_ways, dequantize, lora_linear, quantize, use_backend
from lora_kernels.ops.quantized_linear import quantized_linear
from lora_kernels.reference.dequantize import dequantize as reference_dequantize
from lora_kernels.testing import TENSORS, LoraCase, assert_close, leaves, lora_inputs

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FORMATS = {
    "nf4": ("nf4", {}),
    "nf4-double": ("nf4", {"double_quant": True}),
    "nf4-32": ("nf4", {"block_size": 32}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "fp8-tensor": ("fp8", {"per_tensor": True}),
}
BACKENDS = ("reference", "cpp", "triton")
CPU_BACKENDS = BACKENDS[:2]

CASES = [
    LoraCase(cols=64),
    LoraCase(lead=(1,), cols=96, out=31, rank=1),
    LoraCase(lead=(5,), cols=37, out=29, rank=5, bias=True),
    LoraCase(lead=(17,), cols=70, out=33, rank=16, bias=True, gate="rank"),
    LoraCase(lead=(2, 3), cols=80, out=7, rank=64, gate="rows"),
    LoraCase(lead=(0,), bias=True),
    LoraCase(lead=(), cols=33, out=5),
    LoraCase(x_layout="columns", cols=66),
    LoraCase(lead=(3, 4), x_layout="transposed", factors="views"),
    LoraCase(dropout_p=0.3, cols=35, bias=True),
    LoraCase(lead=(20,), x_lora=True, dropout_p=0.2),
    LoraCase(lead=(3,), cols=1050, out=6, rank=8),
    LoraCase(lead=(38,), cols=256, out=9, rank=3),
]
OF_TRITON = (0, 1, 2, 4, 5, 7, 9, 10)


def parts(q):
    return q.codes, q.scales, q.nested, q.format, *q.shape, q.block


def plain_weight(q, dtype):
    return reference_dequantize(*parts(q), dtype)


def call(backend, inputs, case, weight):
    with use_backend(backend):
        return lora_linear(
            *(inputs["x"], weight, inputs["lora_a"], inputs["lora_b"], case.scaling, inputs["bias"]),
            dropout_p=case.dropout_p,
            gate=inputs["gate"],
            x_lora=inputs["x_lora"],
        )


def run_case(backend, case, device, format="nf4"):
    skip_unavailable(backend, case, device)
    name, options = FORMATS[format]
    given = lora_inputs(case, device)
    # Of a wider dtype than the computation's: a quantised weight belongs to none.
    q = quantize(lora_inputs(replace(case, dtype=FP32), device)["weight"], name, **options)
    dy = torch.randn(*case.lead, case.out, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    mask = mask_of_next_call(case, device)
    wanted = [name for name in case.present() if name != "weight"]

    def reckon(dtype, weight):
        inputs = leaves(given, wanted, dtype)
        y = expected({**inputs, "weight": weight}, case, mask)
        return results(y, {n: t for n, t in inputs.items() if n != "weight"}, dy.to(dtype))

    inputs = {n: t for n, t in leaves(given, wanted).items() if n != "weight"}
    got = results(call(backend, inputs, case, q), inputs, dy)
    eager = reckon(case.dtype, plain_weight(q, case.dtype))
    compare(got, eager, reckon(FP64, plain_weight(q, FP64)), inputs, case, 0.5)
    return got


@pytest.mark.parametrize("dtype", (FP32, BF16, HALF, FP64), ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_case(backend, case, format, dtype, device):
    if backend == "reference" and dtype != FP32 and format in ("nf4-32", "fp8-tensor"):
        pytest.skip("the reference is the oracle itself, and its other formats run")
    run_case(backend, replace(case, dtype=dtype), device, format)


@pytest.mark.parametrize("case", [CASES[i] for i in OF_TRITON], ids=case_id)
@pytest.mark.parametrize("format", FORMATS)
def test_case_triton(case, format, device):
    number = CASES.index(case) + list(FORMATS).index(format)
    run_case("triton", replace(case, dtype=(FP32, BF16, HALF)[number % 3]), device, format)


@pytest.mark.parametrize("format", ("nf4", "int8"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_take_the_dense_path(backend, format, device):
    run_case(backend, LoraCase(lead=(70,), cols=40, out=24, dtype=BF16), device, format)


@pytest.mark.parametrize("multiplier", ("panels", "vendor"))
def test_a_weight_of_several_panels(multiplier, device):
    skip_unavailable("cpp", CASES[0], device)
    with _cpu_ways.forced(multiplier):
        run_case("cpp", LoraCase(lead=(66,), cols=2050, out=2100, rank=2), device, "nf4")


@pytest.mark.parametrize("dtype", (FP32, BF16, HALF, FP64), ids=str)
@pytest.mark.parametrize("shape", ((33, 70), (7, 9), (64, 64), (1, 1), (5, 530), (3, 640)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_dequantize_has_the_same_bits_everywhere(backend, shape, dtype, device):
    skip_unavailable(backend, LoraCase(dtype=dtype), device)
    for name, options in FORMATS.values():
        q = quantize(torch.randn(shape, device=device), name, **options)
        with use_backend(backend):
            assert torch.equal(dequantize(q, dtype), plain_weight(q, dtype)), (name, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_fp8_code_is_decoded(backend, device):
    skip_unavailable(backend, LoraCase(), device)
    q = quantize(torch.randn(16, 16, device=device), "fp8")
    q.codes.copy_(torch.arange(256, dtype=torch.uint8, device=device).view(16, 16))
    with use_backend(backend):
        torch.testing.assert_close(dequantize(q, FP32), plain_weight(q, FP32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_without_a_branch(backend, format, bias, device):
    skip_unavailable(backend, LoraCase(), device)
    q = quantize(torch.randn(21, 70, device=device) / 8, FORMATS[format][0], **FORMATS[format][1])
    x = torch.randn(2, 3, 70, device=device, requires_grad=True)
    b = torch.randn(21, device=device, requires_grad=True) if bias else None
    dy = torch.randn(2, 3, 21, device=device)
    with use_backend(backend):
        y = quantized_linear(x, q, b)
        grads = torch.autograd.grad(y, [x] + [b] * bias, dy)

    def plain(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, b) if t is not None]
        y = torch.nn.functional.linear(inputs[0], plain_weight(q, dtype), *inputs[1:])
        return [y, *torch.autograd.grad(y, inputs, dy.to(dtype))]

    for got, eager, exact in zip((y, *grads), plain(FP32), plain(FP64), strict=True):
        assert_close(got, eager, exact)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_second_derivatives(backend):
    skip_unavailable(backend, LoraCase(), torch.device("cpu"))
    q = quantize(torch.randn(6, 10), "int8")
    tensors = [torch.randn(*shape, dtype=FP64, requires_grad=True) for shape in ((3, 10), (2, 10), (6, 2))]
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(lambda x, a, b: lora_linear(x, q, a, b, 0.5), tensors)
        assert torch.autograd.gradgradcheck(lambda x: quantized_linear(x, q), tensors[:1])


def test_torch_func_sees_through():
    q = quantize(torch.randn(6, 10))
    x, a, b = torch.randn(3, 10), torch.randn(2, 10), torch.randn(6, 2)
    got = torch.func.grad(lambda a: lora_linear(x, q, a, b).square().sum())(a)
    leaf = a.clone().requires_grad_()
    lora_linear(x, q, leaf, b).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad)
    torch.testing.assert_close(torch.func.vmap(lambda x: quantized_linear(x, q))(x), quantized_linear(x, q))


@pytest.mark.parametrize("rows", (3, 40))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_dense_is_kept_for_backward(backend, rows, device):
    skip_unavailable(backend, LoraCase(), device)
    q = quantize(torch.randn(64, 96, device=device))
    x = torch.randn(rows, 96, device=device, requires_grad=True)
    a, b = torch.randn(2, 96, device=device), torch.randn(64, 2, device=device)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        use_backend(backend),
    ):
        y = lora_linear(x, q, a, b) + quantized_linear(x, q)
    assert max(t.nbytes for t in saved) <= q.codes.nbytes < 64 * 96
    y.sum().backward()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rows", (4, 30))
def test_compiles_whole(backend, rows):
    skip_unavailable(backend, LoraCase(), torch.device("cpu"))
    q = quantize(torch.randn(20, 70), double_quant=True)
    inputs = leaves(lora_inputs(LoraCase(lead=(rows,), cols=70, bias=True)), TENSORS)

    def run(x, a, b, bias):
        return lora_linear(x, q, a, b, 0.5, bias).square().sum() + quantized_linear(x, q, bias).sum()

    names = ("x", "lora_a", "lora_b", "bias")
    args = [inputs[name] for name in names]
    with use_backend(backend):
        eager = torch.autograd.grad(run(*args), args)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for one, other in zip(torch.autograd.grad(compiled(*args), args), eager, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_with_dropout(backend, device):
    skip_unavailable(backend, LoraCase(), device)
    q = quantize(torch.randn(12, 40, device=device))
    shapes = ((5, 40), (3, 40), (12, 3))
    tensors = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]

    def run(x, a, b):
        return lora_linear(x, q, a, b, dropout_p=0.4).square().sum()

    with use_backend(backend):
        torch.manual_seed(3)
        plain = torch.autograd.grad(run(*tensors), tensors)
        torch.manual_seed(3)
        again = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False), tensors)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", (3, 20))
def test_result_does_not_depend_on_the_thread_count(rows):
    skip_unavailable("cpp", LoraCase(), torch.device("cpu"))
    threads = torch.get_num_threads()
    weights = [quantize(torch.randn(203, 1100), name) for name in ("nf4", "int8", "fp8")]
    x = torch.randn(rows, 1100)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                found.append([dequantize(q) for q in weights])
                found[-1] += [quantized_linear(x[:16], q) for q in weights]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_autocast_and_a_tensor_scaling():
    q = quantize(torch.randn(6, 64))
    x, a, b = torch.randn(3, 64), torch.randn(2, 64), torch.randn(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = lora_linear(x, q, a, b, bias=torch.ones(6)), quantized_linear(x, q, torch.ones(6))
    assert y.dtype == z.dtype == BF16
    scaling = torch.tensor(0.5, requires_grad=True)
    lora_linear(x, q, a, b, scaling).sum().backward()
    torch.testing.assert_close(scaling.grad, (x @ a.T @ b.T).sum(), rtol=1e-4, atol=1e-4)


def test_errors():
    q = quantize(torch.randn(6, 64))
    x, a, b = torch.randn(3, 64), torch.randn(2, 64), torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"weight: .*got shape"):
        lora_linear(x, quantize(torch.randn(6, 63)), a, b)
    with pytest.raises(ValueError, match="weight: expected device"):
        lora_linear(x.to("meta"), q, a.to("meta"), b.to("meta"))
    with pytest.raises(TypeError, match="weight: expected a QuantizedWeight, got Tensor"):
        quantized_linear(x, torch.randn(6, 64))
    with pytest.raises(TypeError, match="x: expected a floating Tensor"):
        quantized_linear(x.int(), q)
    with pytest.raises(ValueError, match="x: expected last dimension 64"):
        quantized_linear(x[:, :5], q)
    with pytest.raises(ValueError, match="bias: expected shape"):
        quantized_linear(x, q, torch.ones(5))
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32"):
        quantized_linear(x, q, torch.ones(6, dtype=HALF))
    with pytest.raises(TypeError, match="weight: expected a QuantizedWeight"):
        dequantize(x)
