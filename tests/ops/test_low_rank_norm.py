"""Row norms of W + s B A on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import use_backend
from lora_kernels.ops.low_rank_norm import low_rank_norm
from lora_kernels.testing import assert_close

BACKENDS = ("reference", "cpp", "triton")
RANKS = (1, 3, 16, 17, 64, 256)


def tensors(out, cols, rank, dtype, factor_dtype=None):
    generator = torch.Generator().manual_seed(out + cols + rank)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor_dtype = factor_dtype or dtype
    return (
        normal(out, cols).to(dtype),
        normal(rank, cols).to(factor_dtype),
        normal(out, rank).to(factor_dtype),
    )


def check(backend, weight, lora_a, lora_b, scaling=0.5):
    with use_backend(backend):
        got = low_rank_norm(weight, lora_a, lora_b, scaling)
    exact = (weight.double() + scaling * lora_b.double() @ lora_a.double()).norm(dim=1)
    low = lora_b.to(weight.dtype) @ lora_a.to(weight.dtype)
    eager = torch.linalg.norm(weight + scaling * low, dim=1)
    assert got.dtype == torch.promote_types(weight.dtype, torch.float32)
    assert_close(got, eager, exact, "norm", weight.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend, rank, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("its kernels take no float64")
    check(backend, *tensors(21, 300, rank, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_wide_factors(backend):
    weight, lora_a, lora_b = tensors(19, 37, 5, torch.float32)
    check(backend, weight.T.contiguous().T, lora_a.T.contiguous().T, lora_b.T.contiguous().T)
    check(backend, *tensors(9, 40, 4, torch.bfloat16, torch.float32))
    with use_backend(backend):
        assert low_rank_norm(weight[:0], lora_a, lora_b[:0]).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_that_undoes_the_weight_costs_no_accuracy(backend):
    """‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² in float32 would leave nothing but rounding here."""
    _, lora_a, lora_b = tensors(8, 64, 4, torch.float32)
    small = 1e-3 * torch.randn(8, 64)
    weight = small - lora_b @ lora_a
    exact = (weight.double() + lora_b.double() @ lora_a.double()).norm(dim=1)
    with use_backend(backend):
        got = low_rank_norm(weight, lora_a, lora_b)
    assert_close(got, (weight + lora_b @ lora_a).norm(dim=1), exact, "norm")
    assert ((got - exact).abs() / exact).max() < 1e-3


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 40), cols=st.integers(1, 600), rank=st.integers(1, 40))
def test_any_shape(out, cols, rank):
    check("cpp", *tensors(out, cols, rank, torch.float32))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="lora_a, lora_b: expected"):
        low_rank_norm(torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 2))
