"""What every kernel is written in: the interpreted product's rows, on any processor's BLAS."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lora_kernels import _backend, kernels  # noqa: E402
from lora_kernels.kernels.primitives import dot, load_tile, store_tile  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
interpreted = pytest.mark.skipif(not _backend.interpreting(), reason="a card multiplies, and not numpy")


@triton.jit
def dot_kernel(a_ptr, b_ptr, acc_ptr, out_ptr, M, K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr):
    rows, inner, cols = tl.arange(0, BLOCK_M), tl.arange(0, K), tl.arange(0, N)
    a = load_tile(a_ptr, rows, inner, K, 1, M, K)
    b = tl.trans(load_tile(b_ptr, cols, inner, K, 1, N, K))
    acc = load_tile(acc_ptr, rows, cols, N, 1, M, N)
    store_tile(out_ptr, dot(a, b, acc, "ieee"), rows, cols, N, 1, M, N)


def product(a, b, acc):
    """acc + a bᵀ by one tile."""
    out = torch.full_like(acc, torch.nan)
    block = max(16, triton.next_power_of_2(len(a)))
    dot_kernel[(1,)](a, b, acc, out, len(a), a.shape[1], len(b), block)
    return out


@pytest.fixture
def rows_differ(monkeypatch):
    """The matmul of a BLAS that adds up each row in another order, as those of some processors do."""

    def matmul(a, b, dtype=None):
        order = np.arange(a.shape[1])
        sums = [
            (a[i, np.roll(order, i)].astype(dtype), b[np.roll(order, i)].astype(dtype)) for i in range(len(a))
        ]
        return np.stack([np.add.accumulate(x[:, None] * y)[-1] for x, y in sums])

    monkeypatch.setattr(np, "matmul", matmul)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "cols"), [(16, 16), (64, 32), (128, 64)])
def test_no_row_of_dot_depends_on_the_others(dtype, inner, cols, rows_differ):
    a, b = torch.randn(64, inner).to(dtype), torch.randn(cols, inner).to(dtype)
    acc = torch.randn(64, cols)
    whole = product(a, b, acc)
    for count in (1, 2, 15, 16, 17, 40, 64):
        some = torch.randperm(64)[:count]
        assert torch.equal(product(a[some], b, acc[some]), whole[some])
    exact = acc.double() + a.double() @ b.double().T
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5 * inner**0.5)


def test_kernels_multiply_by_dot_alone():
    folder = Path(kernels.__file__).parent
    found = [path.name for path in folder.glob("*.py") if re.search(r"\btl\.dot\w*\(", path.read_text())]
    assert found == ["primitives.py"]
