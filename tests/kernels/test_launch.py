"""tf32 in the kernels follows torch's own switches, by whichever name they were set."""

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.kernels.launch import precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restored():
    before = MATMUL.fp32_precision, torch.backends.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision, torch.backends.fp32_precision = before


def set_allow(value):
    MATMUL.allow_tf32 = value


def set_new(value):
    MATMUL.fp32_precision = value


def set_everywhere(value):
    MATMUL.fp32_precision, torch.backends.fp32_precision = "none", value


@pytest.mark.parametrize(
    ("setter", "value", "want"),
    [
        (torch.set_float32_matmul_precision, "highest", "ieee"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (torch.set_float32_matmul_precision, "medium", "tf32"),
        (set_allow, True, "tf32"),
        (set_allow, False, "ieee"),
        (set_new, "tf32", "tf32"),
        (set_new, "ieee", "ieee"),
        (set_everywhere, "tf32", "tf32"),
        (set_everywhere, "ieee", "ieee"),
    ],
)
def test_tf32_only_where_torch_allows_it(setter, value, want):
    setter(value)
    assert precision(torch.float32) == want


def test_half_precision_needs_no_leave():
    torch.set_float32_matmul_precision("highest")
    assert precision(torch.bfloat16) == precision(torch.float16) == "tf32"
