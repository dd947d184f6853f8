"""The CUDA backend's ops from the public functions to the launch, on tensors of the CPU.

Their C++ is compiled as it is, against headers of ``host_cuda/`` that stand for CUDA's, and a launch runs the
simulation: what is tested is which tensors become which projections, and how many launches they take.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from dataclasses import replace

import decode_harness as harness
import pytest
import torch
from torch.utils import cpp_extension

from lora_kernels import (
    add_multi_lora_,
    multi_lora_linear,
    multi_lora_linear_slices,
    plan_batch,
    slice_adapters,
    use_backend,
)
from lora_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(harness.missing is not None, reason=str(harness.missing))
RANKS = {48: (3, 16, 0, 40), 16: (5, 0, 0, 1), 144: (0, 33, 4, 0), 32: (1, 1, 1, 1), 64: (0, 0, 17, 2)}
COLS = 80
ROOT = harness.HERE.parents[1]


def compile_ops(folder, simulation):
    """The ops' library, which launches ``simulation``; from one source, as torch's headers take long."""
    sources = (harness.HERE / "host_cuda/decode_ops.cpp", ROOT / "csrc/cuda/multi_lora_linear.cpp")
    includes = [f"-I{harness.HERE / 'host_cuda'}"]
    includes += [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    paths = [*cpp_extension.library_paths(), str(simulation)]
    links = [part for path in paths for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = [harness.COMPILER, *harness.FLAGS, "-O1", *includes, "-fPIC", "-shared", "-x", "c++", "-"]
    command += [
        "-o",
        str(folder / "decode_ops.so"),
        *links,
        f"-l:{harness.SIMULATION}",
        "-ltorch_cpu",
        "-lc10",
    ]
    text = "".join(f'#include "{source}"\n' for source in sources)
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def library(made_once):
    """The ops' library; loaded, it gives the CUDA ops a kernel for CPU tensors."""
    simulation = made_once("decode_simulation", harness.compile_simulation)
    folder = made_once("decode_ops", functools.partial(compile_ops, simulation=simulation))
    torch.ops.load_library(folder / "decode_ops.so")
    return ctypes.CDLL(str(folder / "decode_ops.so"))


@pytest.fixture(params=(True, False), ids=("cluster", "two_launches"))
def card(request, library, pretended_card):
    library.use_card(int(request.param))
    return request.param


def stacks_of(widths, dtype):
    """Other ranks and scalings for each linear, on pages in no order."""
    return [
        harness.scattered(
            [(torch.randn(r, COLS) / COLS**0.5).to(dtype) for r in RANKS[width]],
            [torch.randn(width, r).to(dtype) for r in RANKS[width]],
            torch.rand(4) + 0.5,
        )
        for width in widths
    ]


def expected(stacks, base, x, ids, weights, kind):
    """base + the deltas in the dtype ``kind``, by the reference."""
    wide = [
        type(s)(s.a_pages.to(kind), s.b_pages.to(kind), s.pages, s.spans, s.scalings, s.max_rank)
        for s in stacks
    ]
    y = base.to(kind)
    with use_backend("reference"):
        return add_multi_lora_(y.clone(), x.to(kind), slice_adapters(*wide), ids, weights)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("widths", ((48,), (48, 16, 144), (48, 16, 144, 32, 64)), ids=len)
@pytest.mark.parametrize("weighted", (False, True))
def test_slices_take_one_launch_for_four(library, card, poisoned, widths, dtype, weighted):
    stacks, ids = stacks_of(widths, dtype), torch.tensor([3, -1, 0, 1, 0, 2, -1])
    x, base = torch.randn(7, COLS).to(dtype), torch.randn(7, sum(widths)).to(dtype)
    weights, y = torch.rand(7, 2)[:, :1] if weighted else None, base.clone()
    of_rows = ids if weights is None else ids[:, None]
    plan = plan_batch(ids, 4)
    with use_backend("cuda"):
        assert add_multi_lora_(y, x, slice_adapters(*stacks), of_rows, weights, plan=plan) is y
    assert library.launches_since() == -(-len(widths) // 4) * (1 if card else 2)
    eager, exact = (expected(stacks, base, x, of_rows, weights, kind) for kind in (dtype, torch.float64))
    assert_close(y, eager, exact, "y", dtype)
    assert torch.equal(y[ids < 0], base[ids < 0])


def test_linears_that_share_x(library, card, poisoned):
    """Query, key and value from their weights; y is theirs side by side."""
    widths = (48, 16, 144)
    stacks, ids = stacks_of(widths, torch.bfloat16), torch.tensor([3, -1, 1])
    x = torch.randn(3, 2, COLS).bfloat16()
    bases = [torch.randn(width, COLS).bfloat16() / COLS**0.5 for width in widths]
    rows, repeated = x.flatten(0, 1), ids.repeat_interleave(2)
    plan = plan_batch(repeated, 4)
    with use_backend("cuda"):
        ys = multi_lora_linear_slices(x, bases, slice_adapters(*stacks), ids, plan=plan)
        assert library.launches_since() == (1 if card else 2)
        alone = [multi_lora_linear(x, w, s, ids, plan=plan) for w, s in zip(bases, stacks, strict=True)]
    assert all(torch.equal(y, one) for y, one in zip(ys, alone, strict=True))
    results = []
    for kind in (x.dtype, torch.float64):
        base = torch.cat([rows.to(kind) @ w.to(kind).T for w in bases], 1)
        results.append(expected(stacks, base, rows, repeated, None, kind))
    assert_close(torch.cat(ys, -1).flatten(0, 1), *results, "y", x.dtype)


def test_part_of_a_wider_matrix(card):
    (stack,), ids = stacks_of((48,), torch.float16), torch.tensor([3, 1, 0])
    x, wide = torch.randn(3, COLS).half(), torch.randn(3, 96).half()
    before = wide.clone()
    plan = plan_batch(ids, 4)
    with use_backend("cuda"):
        add_multi_lora_(wide[:, 16:64], x, stack, ids, plan=plan)
    eager, exact = (
        expected([stack], before[:, 16:64], x, ids, None, kind) for kind in (x.dtype, torch.float64)
    )
    assert_close(wide[:, 16:64], eager, exact, "y", x.dtype)
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 64:], before[:, 64:])


def test_the_delta_alone_is_the_op_that_has_a_gradient(library, card, poisoned):
    """A frozen adapter's x has a gradient: the op that returns a new delta."""
    (stack,), ids = stacks_of((48,), torch.bfloat16), torch.tensor([3, -1, 0, 3])
    x = torch.randn(4, COLS).bfloat16().requires_grad_()
    plan = plan_batch(ids, 4)
    with use_backend("cuda"):
        y = multi_lora_linear(x, None, stack, ids, plan=plan)
    assert library.launches_since() == (1 if card else 2)
    zeros = torch.zeros(4, 48)
    eager, exact = (
        expected([stack], zeros, x.detach(), ids, None, kind) for kind in (x.dtype, torch.float64)
    )
    assert_close(y.detach(), eager, exact, "y", x.dtype)


@pytest.mark.parametrize("weighted", (False, True))
def test_with_the_base_product(library, pretended_card, poisoned, weighted):
    library.use_card(1)
    (stack,), ids = stacks_of((144,), torch.bfloat16), torch.tensor([1, -1, 2, 1])
    x, weight = torch.randn(4, COLS).bfloat16(), torch.randn(144, COLS).bfloat16() / COLS**0.5
    bias, weights = torch.randn(144).bfloat16(), torch.rand(4) if weighted else None
    layout = (stack.a_pages, stack.b_pages, stack.pages, stack.spans, stack.scalings, weights)
    fused = torch.ops.lora_kernels.cuda_multi_lora_linear_fused.default
    y = fused(x, weight, bias, *layout, *plan_batch(ids, 4)[1:], stack.max_rank)
    assert library.launches_since() == 1
    of_rows, factors = (ids, None) if weights is None else (ids[:, None], weights[:, None])
    eager, exact = (
        expected([stack], x.to(kind) @ weight.to(kind).T + bias.to(kind), x, of_rows, factors, kind)
        for kind in (x.dtype, torch.float64)
    )
    assert_close(y, eager, exact, "y", x.dtype)


def test_what_does_not_fit_leaves_y_alone(library):
    """The last of five linears is of another dtype: the op sees it before its first launch."""
    library.use_card(1)
    stacks = stacks_of((48, 16, 144, 32, 64), torch.bfloat16)
    stacks[-1] = replace(stacks[-1], b_pages=stacks[-1].b_pages.half())
    names = ("a_pages", "b_pages", "pages", "spans", "scalings")
    lists = [[getattr(stack, name) for stack in stacks] for name in names]
    y, x, plan = (
        torch.ones(3, 304).bfloat16(),
        torch.randn(3, COLS).bfloat16(),
        plan_batch(torch.arange(3), 4),
    )
    with pytest.raises(RuntimeError, match="b_pages: expected BFloat16"):
        torch.ops.lora_kernels.cuda_multi_lora_linear_add(y, x, *lists, None, *plan[1:], None, 40, False)
    with pytest.raises(RuntimeError, match=r"y: expected shape \[3, 240\]"):
        short = [many[:4] for many in lists]
        torch.ops.lora_kernels.cuda_multi_lora_linear_add(y, x, *short, None, *plan[1:], None, 40, False)
    assert (y == 1).all() and library.launches_since() == 0
