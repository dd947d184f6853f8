"""The CUDA decode kernels: when they run, why they do not, and (with a card) what they give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_kernels import (
    BackendError,
    _backend,
    _ops,
    add_multi_lora_,
    multi_lora_linear,
    multi_lora_linear_slices,
    plan_batch,
    slice_adapters,
    stack_adapters,
    use_backend,
)
from lora_kernels.ops import _decode, _dispatch
from lora_kernels.testing import assert_close

needs_card = pytest.mark.skipif(
    _backend.unavailable("cuda", "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, 8)
    is not None,
    reason="no card, or the extension was built without its CUDA kernels",
)
RANKS = (3, 16, 0, 40)
LEAD = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


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


def test_it_takes_a_decode_batch(pretended_card):
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
        ({"coef": torch.ones(8)[::2]}, "not torch.float32 with gaps"),
        ({"spans": torch.tensor([[0, 8]])}, "contiguous torch.int32 indices, not torch.int64"),
    ],
    ids=range(14),
)
def test_it_says_what_it_does_not_take(pretended_card, options, why):
    assert why in _decode.misfit("multi_lora_linear", op_args(**options))


def test_other_ops_are_not_its_own(pretended_card):
    reason = _decode.misfit("lora_linear", ())
    assert "kernels for multi_lora_linear, multi_lora_linear_add, not lora_linear" in reason


def add_args(rows=4, cols=64, widths=(32, 16), ranks=(8, 3), dtype=torch.bfloat16, **changes):
    """Of ``multi_lora_linear_add``, for linears of other widths and ranks."""
    stacks = [
        stack_adapters([torch.randn(r, cols).to(dtype)], [torch.randn(out, r).to(dtype)])
        for r, out in zip(ranks, widths, strict=True)
    ]
    plan = plan_batch(torch.zeros(rows, dtype=torch.long), 1)
    named = {
        "y": torch.randn(rows, sum(widths)).to(dtype),
        "x": torch.randn(rows, cols).to(dtype),
        **{name: [getattr(s, name) for s in stacks] for name in ("a_pages", "b_pages", "pages", "spans")},
        "scalings": [s.scalings for s in stacks],
        "weights": None,
        "order": plan.order,
        "offsets": plan.offsets,
        "tiles": plan.tiles,
        "table": slice_adapters(*stacks).table,
        "max_rank": max(ranks),
        "batch_invariant": False,
    }
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"widths": (32,), "ranks": (256,)},
        {"widths": (16,) * 6, "ranks": (1, 0, 3, 4, 5, 6)},
        {"weights": torch.rand(4)},
        {"y": torch.randn(4, 80).bfloat16()[:, 16:64]},
        {"rows": 512},
    ],
    ids=range(6),
)
def test_it_takes_slices(pretended_card, options):
    assert _decode.misfit("multi_lora_linear_add", add_args(**options)) is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, not torch.float32"),
        ({"ranks": (8, 257)}, "rank 1 to 256, not 257"),
        ({"ranks": (0, 0)}, "rank 1 to 256, not 0"),
        ({"rows": 513}, "up to 512 rows"),
        ({"order": torch.zeros(8, dtype=torch.int32)}, "one adapter each"),
        ({"scalings": [torch.ones(1), torch.ones(1).double()]}, "float32 scalings, not torch.float64"),
        ({"weights": torch.ones(4).half()}, "float32 scalings, not torch.float16"),
        ({"weights": torch.ones(8)[::2]}, "not torch.float32 with gaps"),
        ({"pages": [torch.arange(8), torch.arange(3)]}, "int32 indices, not torch.int64"),
        ({"cols": 72}, "multiple of 16 columns"),
        ({"widths": (32, 24)}, "multiple of 16 columns"),
        ({"y": torch.randn(4, 56).bfloat16()[:, 4:52]}, "contiguous rows"),
        ({"y": torch.randn(48, 4).bfloat16().T}, "contiguous rows"),
        ({"y": torch.randn(4, 48).half()}, "one dtype, not torch.float16 with torch.bfloat16"),
        ({"rows": 1, "cols": 40_000, "ranks": (1, 256)}, "columns are more than"),
    ],
    ids=range(15),
)
def test_it_says_why_it_does_not_take_slices(pretended_card, options, why):
    assert why in _decode.misfit("multi_lora_linear_add", add_args(**options))


def test_the_widest_rank_decides_whether_slices_fit(pretended_card):
    assert _decode.misfit("multi_lora_linear_add", add_args(1, 40_000, ranks=(1, 16))) is None


def test_a_batch_that_must_not_matter_gets_what_any_batch_gets(pretended_card):
    args = add_args(batch_invariant=True)
    assert "a larger batch" in _decode.misfit("multi_lora_linear_add", args)
    with use_backend("cuda"):
        assert _decode.misfit("multi_lora_linear_add", args) is None


@pytest.mark.parametrize("op", _ops.CUDA_OPS)
def test_on_a_card_it_comes_before_triton(pretended_card, monkeypatch, op):
    args = {"multi_lora_linear": op_args, "multi_lora_linear_add": add_args}[op]
    monkeypatch.setattr(_dispatch, "_lead", lambda given: SimpleNamespace(**LEAD, shape=given[0].shape))
    monkeypatch.setattr(_backend, "resolve", lambda *kind: "triton")
    with use_backend("auto"):
        assert _dispatch._choose(op, args()) == "cuda"
        assert _dispatch._choose(op, args(rows=513)) == "triton"
    with use_backend("cuda"), pytest.raises(BackendError, match="cannot run: its kernels take up to 512"):
        _dispatch._choose(op, args(rows=513))
    with use_backend("triton"):
        assert _dispatch._choose(op, args()) == "triton"


@pytest.mark.parametrize("op", ("batch_plan", "dropout_mask", "row_dropout_mask"))
def test_asked_for_by_name_it_has_plans_and_masks(pretended_card, op):
    """Triton's, whose data its kernels share."""
    with use_backend("cuda"):
        assert _dispatch._choose(op, (torch.zeros(4, dtype=torch.long),)) == "cuda"
    assert ".kernels." in _backend.implementation("cuda", op).__module__


def test_its_function_is_the_extensions():
    function = _backend.implementation("cuda", "multi_lora_linear_add")
    assert function is torch.ops.lora_kernels.cuda_multi_lora_linear_add.default


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
@pytest.mark.parametrize("rows", (1, 8, 40))
@pytest.mark.parametrize("linears", (1, 3, 5))
def test_slices_on_a_card(rows, linears):
    x, _, first, ids = on_card(torch.bfloat16, rows)
    others = [on_card(torch.bfloat16, 1, out=64 * (i + 1))[2] for i in range(linears - 1)]
    slices = slice_adapters(first, *others)
    with torch.no_grad():
        with use_backend("cuda"):
            ys = multi_lora_linear_slices(x, [None] * linears, slices, ids)
        for y, stack in zip(ys, slices.stacks, strict=True):
            wide = [t.double() for t in (stack.a_pages, stack.b_pages)]
            exact_stack = type(stack)(*wide, stack.pages, stack.spans, stack.scalings, stack.max_rank)
            with use_backend("reference"):
                eager = multi_lora_linear(x, None, stack, ids)
                exact = multi_lora_linear(x.double(), None, exact_stack, ids)
            assert_close(y.cpu(), eager.cpu(), exact.cpu(), "y", x.dtype)


@pytest.mark.gpu
@needs_card
def test_slices_in_a_cuda_graph():
    x, _, stack, ids = on_card(torch.bfloat16, 16)
    slices, plan = slice_adapters(stack, on_card(torch.bfloat16, 1, out=128)[2]), plan_batch(ids, len(RANKS))
    y = torch.ones(16, 512, dtype=x.dtype, device=x.device)
    expected = y.clone()
    with use_backend("cuda"):
        add_multi_lora_(expected, x, slices, ids, plan=plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            add_multi_lora_(y, x, slices, ids, plan=plan)
        y.fill_(1)
        graph.replay()
    assert torch.equal(y, expected)


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
