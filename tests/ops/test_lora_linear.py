"""The matrix: shapes, layouts, options, dtypes and gradients of ``lora_linear`` on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_linear_harness import CPU_PATHS, PATHS, case_id, run_case

from lora_kernels import lora_linear, use_backend
from lora_kernels.planner import use_strategy
from lora_kernels.testing import TENSORS, LoraCase, lora_inputs

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FP32, BF16, HALF, FP64)
RANKS = (1, 2, 3, 8, 16, 17, 33, 64, 128, 256)

VARIANTS = [
    LoraCase(),
    LoraCase(lead=(1,)),
    LoraCase(lead=(0,)),
    LoraCase(lead=(3, 0), bias=True, gate="rows"),
    LoraCase(lead=()),
    LoraCase(lead=(), gate="rank", bias=True, dropout_p=0.3),
    LoraCase(lead=(2, 5)),
    LoraCase(lead=(2, 3, 4), bias=True, gate="rows"),
    LoraCase(lead=(17,), cols=37, out=29, rank=5, bias=True),
    LoraCase(lead=(33,), cols=1, out=1, rank=1),
    LoraCase(lead=(5,), cols=80, out=7),
    LoraCase(x_layout="strided"),
    LoraCase(x_layout="columns", dropout_p=0.4),
    LoraCase(lead=(3, 4), x_layout="transposed", bias=True),
    LoraCase(weight="transposed"),
    LoraCase(weight="none"),
    LoraCase(weight="none", bias=True, gate="rank", x_lora=True),
    LoraCase(factors="views"),
    LoraCase(factors="views", rank=1, gate="rows"),
    LoraCase(factors="transposed", dropout_p=0.2),
    LoraCase(bias=True, gate="rank"),
    LoraCase(gate="rows"),
    LoraCase(x_lora=True),
    LoraCase(x_lora=True, gate="rows", dropout_p=0.5),
    LoraCase(scaling=0.0),
    LoraCase(scaling=-2.5, cols=21, dropout_p=0.1),
    LoraCase(lead=(40,), cols=67, out=45, rank=9, bias=True, gate="rank", x_lora=True, dropout_p=0.25),
    LoraCase(dropout_p=0.9, weight="none"),
    LoraCase(branch_cols=37, bias=True, dropout_p=0.3),
    LoraCase(lead=(2, 5), branch_cols=9, gate="rank", weight="transposed"),
    LoraCase(branch_cols=40, weight="none", bias=True),
    LoraCase(gate="scale"),
    LoraCase(lead=(2, 5), gate="scale", bias=True, dropout_p=0.2, factors="views"),
    LoraCase(lead=(), gate="scale"),
    LoraCase(factors="none", bias=True),
    LoraCase(lead=(2, 5), factors="none", gate="rows", rank=7),
    LoraCase(factors="none", weight="none", gate="scale", rank=1),
    LoraCase(lead=(3, 5), factors="samples", bias=True, gate="rows"),
    LoraCase(lead=(3, 2, 2), factors="samples", weight="none", dropout_p=0.3, branch_cols=9),
    LoraCase(lead=(3, 5), factors="sample a", gate="scale", dropout_p=0.25),
    LoraCase(lead=(0, 5), factors="samples"),
]
STRATEGIES = pytest.mark.parametrize("strategy", ("beta", "kext", "single"), indirect=True)
SUBSETS = [(name,) for name in TENSORS] + [
    (),
    ("lora_a", "lora_b"),
    ("x", "lora_b"),
    ("x", "weight"),
    ("lora_b", "gate"),
    ("x", "x_lora"),
    ("weight", "lora_a", "x_lora"),
    tuple(TENSORS),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=case_id)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_variant(path, case, dtype, device):
    run_case(path, replace(case, dtype=dtype), device)


@pytest.mark.spread("case", "strategy", of=3)
@STRATEGIES
@pytest.mark.parametrize("case", VARIANTS, ids=case_id)
def test_variant_triton(case, strategy, device):
    dtype = DTYPES[VARIANTS.index(case) // 3 % 3]
    run_case("triton", replace(case, dtype=dtype), device)


@pytest.mark.parametrize("dtype", (FP32, HALF), ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_rank(path, rank, dtype, device):
    run_case(path, LoraCase(lead=(9,), cols=40, rank=rank, dtype=dtype, dropout_p=0.1, gate="rank"), device)


@pytest.mark.spread("rank", "strategy", of=3)
@STRATEGIES
@pytest.mark.parametrize("rank", RANKS)
def test_rank_triton(rank, strategy, device):
    dtype = DTYPES[RANKS.index(rank) // 3 % 3]
    run_case("triton", LoraCase(lead=(9,), cols=40, rank=rank, dtype=dtype, dropout_p=0.1), device)


@STRATEGIES
def test_widest_rank_triton(strategy, device):
    case = LoraCase(lead=(3,), cols=16, out=8, rank=512, dtype=HALF, adapter_dtype=FP32, dropout_p=0.1)
    run_case("triton", case, device)


@pytest.mark.parametrize("path", CPU_PATHS)
def test_widest_rank(path, device):
    run_case(path, LoraCase(lead=(3,), cols=16, out=8, rank=512, dtype=BF16), device)


@pytest.mark.parametrize("dtype", (BF16, HALF), ids=str)
@pytest.mark.parametrize("options", ({}, {"gate": "rows", "dropout_p": 0.2}), ids=("plain", "gated"))
@pytest.mark.parametrize("path", PATHS)
def test_fp32_adapters_on_half_base(path, options, dtype, device):
    run_case(path, LoraCase(dtype=dtype, adapter_dtype=FP32, rank=6, **options), device)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_requires_grad_subset(path, subset, dropout_p, device):
    separate = "x_lora" in subset
    case = LoraCase(bias=True, gate="rank", x_lora=separate, dropout_p=dropout_p)
    run_case(path, case, device, requires_grad=subset)


@pytest.mark.spread("subset", "strategy", of=3)
@STRATEGIES
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_requires_grad_subset_triton(subset, strategy, device):
    drop = 0.3 if len(subset) % 2 else 0.0
    case = LoraCase(bias=True, gate="rank", x_lora="x_lora" in subset, dropout_p=drop, dtype=HALF)
    run_case("triton", case, device, requires_grad=subset)


@pytest.mark.parametrize("gate", ("none", "rank", "rows"))
@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_scaling_tensor_has_a_gradient(backend, gate, device):
    inputs = lora_inputs(LoraCase(gate=gate, dtype=FP32), device)
    scaling = torch.tensor(0.7, device=device, requires_grad=True)
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    with use_backend(backend):
        y = lora_linear(*args, scaling, gate=inputs["gate"])
    dy = torch.ones_like(y)
    y.backward(dy)
    with use_backend("reference"):
        plain = lora_linear(*args, 0.7, gate=inputs["gate"])
        unit = lora_linear(inputs["x"], None, *args[2:], 1.0, gate=inputs["gate"])
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(scaling.grad, (unit * dy).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", (0.0, 0.5))
@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_eval_switches_dropout_off(backend, p, device):
    inputs = lora_inputs(LoraCase(), device)
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    with use_backend(backend):
        off = lora_linear(*args, dropout_p=p, training=False)
        none = lora_linear(*args)
    assert torch.equal(off, none)


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_two_runs_are_bitwise_equal(backend, device):
    _bitwise_equal(backend, device)


@STRATEGIES
def test_two_runs_of_a_strategy_are_bitwise_equal(strategy, device):
    _bitwise_equal("triton", device)


def _bitwise_equal(backend, device):
    case = LoraCase(lead=(40,), cols=72, out=40, rank=8, dropout_p=0.2, dtype=BF16)
    first, second = (run_case(backend, case, device) for _ in range(2))
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    path=st.sampled_from(CPU_PATHS),
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    cols=st.integers(1, 70),
    out=st.integers(1, 40),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    weight=st.sampled_from(("dense", "transposed", "none")),
    bias=st.booleans(),
    gate=st.sampled_from(("none", "rank", "rows")),
    x_lora=st.booleans(),
    x_layout=st.sampled_from(("dense", "strided", "columns", "transposed")),
    factors=st.sampled_from(("dense", "views", "transposed")),
    dropout_p=st.sampled_from((0.0, 0.1, 0.6)),
)
def test_any_shape(path, **fields):
    run_case(path, LoraCase(**fields), torch.device("cpu"), ulps=2.0)


@settings(max_examples=16, deadline=None, database=None, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    cols=st.integers(1, 70),
    out=st.integers(1, 40),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES[:3]),
    gate=st.sampled_from(("none", "rank", "rows")),
    x_lora=st.booleans(),
    dropout_p=st.sampled_from((0.0, 0.4)),
    strategy=st.sampled_from(("beta", "kext", "single")),
)
def test_any_shape_triton(strategy, **fields):
    case = LoraCase(**fields)
    with use_strategy(strategy):
        run_case("triton", case, torch.device("cuda" if torch.cuda.is_available() else "cpu"), ulps=2.0)
