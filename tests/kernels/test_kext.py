"""The persistent GEMM that takes the branch along: both ways of loading, any layout, any tile."""

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.kernels import kext, launch
from lora_kernels.kernels.config import GemmTile
from lora_kernels.reference.dropout import dropout_apply, dropout_mask

SMALL = GemmTile(16, 16, 16, block_k=16, group_m=2)
WIDE = GemmTile(64, 32, 16, block_k=32, group_m=1)


def operands(device, rows=45, inner=40, cols=56, rank=20, dtype=torch.float32):
    shapes = ((rows, inner), (inner, cols), (rows, rank), (rank, cols))
    return [torch.randn(shape, dtype=dtype).to(device) for shape in shapes]


def expected(a, w, h, c, mask, p):
    branch = (h.double() @ c.double()) / (1 - p)
    return a.double() @ w.double() + dropout_apply(branch * (1 - p), mask, p)


@pytest.fixture
def launched(monkeypatch, device):
    """Whether each launch went through descriptors."""
    seen = []
    made = kext._descriptors

    def record(*args):
        seen.append(made(*args) is not None)
        return made(*args)

    monkeypatch.setattr(kext, "_descriptors", record)
    return seen


@pytest.mark.parametrize("tile", (SMALL, WIDE), ids=("small", "wide"))
@pytest.mark.parametrize("layout", ("along_n", "along_k", "columns"))
def test_every_layout_of_the_weight(layout, tile, device, launched, poisoned):
    a, w, h, c = operands(device)
    seed, p = torch.tensor([7], device=device), 0.3
    mask = dropout_mask(seed, a.shape[0], w.shape[1], p)
    if layout == "along_k":
        w = w.T.contiguous().T
    if layout == "columns":
        w = torch.stack((w, w), -1).flatten(1)[:, ::2]
    out = kext.matmul(a, w, h, c, tile, scale=1 / (1 - p), mask=mask)
    torch.testing.assert_close(out, expected(a, w, h, c, mask, p).float(), rtol=1e-5, atol=1e-4)
    assert launched == [layout != "columns" and launch.has_descriptors(torch.device(device))]


@pytest.mark.parametrize(
    ("rows", "inner", "cols"), ((1, 40, 56), (45, 41, 56), (45, 40, 57), (200, 3, 1)), ids=str
)
def test_what_descriptors_cannot_take_goes_through_pointers(rows, inner, cols, device, launched, poisoned):
    a, w, h, c = operands(device, rows, inner, cols, rank=3)
    out = kext.matmul(a, w, h, c, SMALL, scale=0.5)
    exact = a.double() @ w.double() + 0.5 * h.double() @ c.double()
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-4)
    assert launched == [inner % 4 == 0 and cols % 4 == 0 and launch.has_descriptors(torch.device(device))]


def test_an_unaligned_start_goes_through_pointers(device, launched):
    a, w, h, c = operands(device)
    shifted = torch.empty(a.numel() + 1, device=device)[1:].view_as(a).copy_(a)
    same = kext.matmul(a, w, h, c, SMALL), kext.matmul(shifted, w, h, c, SMALL)
    assert torch.equal(*same)
    assert launched == [launch.has_descriptors(torch.device(device)), False]


def test_the_grid_changes_no_bit(device, monkeypatch):
    args = operands(device, rows=100)
    results = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(kext, "processors", lambda _, n=programs: n)
        results.append(kext.matmul(*args, SMALL))
    assert all(torch.equal(results[0], other) for other in results[1:])
