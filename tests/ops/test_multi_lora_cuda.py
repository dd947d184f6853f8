"""The CUDA decode kernels: when they run, why they do not, and (with a card) what they give."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import BackendError, _backend, multi_lora_linear, plan_batch, stack_adapters, use_backend
from lora_kernels.ops import _decode
from lora_kernels.testing import assert_close

needs_card = pytest.mark.skipif(
    _backend.unavailable("cuda", "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, 8)
    is not None,
    reason="no card, or the extension was built without its CUDA kernels",
)
RANKS = (3, 16, 0, 40)


@pytest.fixture
def pretend(monkeypatch):
    """A card of compute capability 9.0 and its kernels: what is chosen can be asked on tensors of the CPU."""
    monkeypatch.setattr(_backend, "_cuda_unavailable", _fits_but_for_the_device)
    monkeypatch.setattr(_decode, "_card", lambda device: (227 * 1024, 9))


def _fits_but_for_the_device(device_type, dtype, rank):
    if dtype not in _backend.CUDA_DTYPES:
        return f"its kernels take float16 and bfloat16, not {dtype}"
    return None if 1 <= rank <= _backend.CUDA_MAX_RANK else f"its kernels take rank 1 to 256, not {rank}"


def op_args(rows=4, cols=64, out=32, dtype=torch.bfloat16, rank=8, **changes):
    stack = stack_adapters([torch.randn(rank, cols).to(dtype)], [torch.randn(out, rank).to(dtype)])
    plan = plan_batch(torch.zeros(rows, dtype=torch.long), 1)
    named = {
        "x": torch.randn(rows, cols).to(dtype),
        "a_pages": stack.a_pages,
        "b_pages": stack.b_pages,
        "pages": stack.pages,
        "spans": stack.spans,
        "coef": torch.ones(rows),
        "order": plan.order,
        "offsets": plan.offsets,
        "tiles": plan.tiles,
        "mask": None,
        "keep_scale": None,
        "max_rank": rank,
        "keep_h": False,
    }
    return tuple({**named, **changes}.values())


def test_it_takes_a_decode_batch(pretend):
    assert _decode.misfit("multi_lora_linear", op_args()) is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, not torch.float32"),
        ({"rank": 257}, "rank 1 to 256, not 257"),
        ({"keep_h": True}, "for inference"),
        ({"keep_scale": torch.ones(4)}, "for inference"),
        ({"rows": 513}, "up to 512 rows"),
        ({"order": torch.zeros(8, dtype=torch.int32)}, "one adapter each"),
        ({"coef": torch.ones(4).double()}, "float32 scalings"),
        ({"cols": 72}, "multiple of 16 columns"),
        ({"out": 40}, "multiple of 16 columns"),
        ({"x": torch.randn(64, 4).bfloat16().T}, "contiguous rows"),
        ({"a_pages": torch.randn(8, 64).half()}, "one dtype, not torch.float16 with torch.bfloat16"),
        ({"rows": 2, "cols": 1 << 16, "rank": 1}, "columns are more than"),
    ],
    ids=range(12),
)
def test_it_says_what_it_does_not_take(pretend, options, why):
    assert why in _decode.misfit("multi_lora_linear", op_args(**options))


def test_other_ops_are_not_its_own(pretend):
    assert "kernels for multi_lora_linear, not lora_linear" in _decode.misfit("lora_linear", ())


def test_asked_for_by_name_it_raises():
    stack = stack_adapters([torch.randn(2, 16).half()], [torch.randn(16, 2).half()])
    with use_backend("cuda"), pytest.raises(BackendError, match="the tensors are on cpu"):
        multi_lora_linear(torch.randn(3, 16).half(), None, stack, torch.zeros(3, dtype=torch.long))


def test_the_backward_pass_is_tritons():
    module = _backend.implementation("cuda", "multi_lora_linear_backward").__module__
    assert module == "lora_kernels.kernels.multi_lora_linear"


def on_card(dtype, rows, cols=512, out=384):
    device = torch.device("cuda")
    a = [torch.randn(r, cols, device=device).to(dtype) / cols**0.5 for r in RANKS]
    b = [torch.randn(out, r, device=device).to(dtype) for r in RANKS]
    stack = stack_adapters(a, b, torch.rand(len(RANKS), device=device) + 0.5)
    ids = torch.randint(-1, len(RANKS), (rows,), device=device)
    x = torch.randn(rows, cols, device=device).to(dtype)
    weight = torch.randn(out, cols, device=device).to(dtype) / cols**0.5
    return x, weight, stack, ids


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", (1, 8, 40))
@pytest.mark.parametrize("base", (False, True))
def test_on_a_card(dtype, rows, base):
    x, weight, stack, ids = on_card(dtype, rows)
    weight = weight if base else None
    with torch.no_grad():
        with use_backend("cuda"):
            y = multi_lora_linear(x, weight, stack, ids)
        with use_backend("reference"):
            eager = multi_lora_linear(x, weight, stack, ids)
            wide = [t.double() for t in (stack.a_pages, stack.b_pages)]
            exact_stack = type(stack)(*wide, stack.pages, stack.spans, stack.scalings, stack.max_rank)
            base64 = None if weight is None else weight.double()
            exact = multi_lora_linear(x.double(), base64, exact_stack, ids)
    assert_close(y.cpu(), eager.cpu(), exact.cpu(), "y", dtype)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("rows", (4, 32))
def test_in_a_cuda_graph(rows):
    x, weight, stack, ids = on_card(torch.bfloat16, rows)
    plan = plan_batch(ids, len(RANKS))
    with torch.no_grad(), use_backend("cuda"):
        expected = multi_lora_linear(x, weight, stack, ids, plan=plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multi_lora_linear(x, weight, stack, ids, plan=plan)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)
