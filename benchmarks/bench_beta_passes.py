"""The passes of the *beta* strategy one by one: bytes, achieved bandwidth, and time over the floor.

The floor of a pass is the bytes that it must read and write once, at the rate of a plain copy of x that is
measured beside it. The matrix products in between are the vendor's; they show what is left for them.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import planner
from lora_kernels._backend import unavailable
from lora_kernels.ops import _dispatch
from lora_kernels.reference.dropout import dropout_apply

from .bench_lora_linear import LLAMA_3_8B
from .checks import errors, judge
from .providers import SCALING, Case, Problem, make_problem
from .suites import TRAINING, Benchmark, Derived, Mode, Plan, Provider, Row, Runner

COPY = "copy"
SEED = 7


@dataclass(frozen=True)
class Operands:
    """What the passes read, in any dtype; the keep bits are the same for all of them."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    h: Tensor
    u: Tensor
    mask: Tensor | None
    p: float

    def dropped(self, values: Tensor) -> Tensor:
        return values if self.mask is None else dropout_apply(values, self.mask, self.p)


def _seed(case: Case) -> Tensor | None:
    return torch.full((1,), SEED, dtype=torch.int64, device=case.device) if case.dropout_p else None


def _operands(problem: Problem, wide: bool = False) -> Operands:
    case, seed = problem.case, _seed(problem.case)
    given = (problem.x, problem.weight, problem.lora_a, problem.lora_b, problem.dy)
    x, weight, a, b, dy = (t.detach().double() if wide else t.detach() for t in given)
    mask = (
        None if seed is None else _dispatch.call("dropout_mask", seed, case.rows, case.cols, case.dropout_p)
    )
    # h and u are inputs of the later passes: of the case's dtype, so that both sides read the same.
    narrow = Operands(problem.x.detach(), weight, a, b, dy, x, x, mask, case.dropout_p)
    h = (narrow.dropped(narrow.x) @ problem.lora_a.T).to(x.dtype)
    u = (problem.dy @ problem.lora_b * SCALING).to(x.dtype)
    return Operands(x, weight, a, b, dy, h, u, mask, case.dropout_p)


@dataclass(frozen=True)
class Pass:
    """One kernel, or a kernel with the sum of its parts.

    Args:
        build: what to time; it returns the tensors that it writes.
        want: the same in PyTorch operations, in any dtype.
        touched: the elements that it reads or writes once, by (M, K, N, r).
        masked: whether it reads or writes the keep bits.
        ours: whether it is one of our kernels.
    """

    build: Callable[[Problem, Operands], Callable[[], tuple[Tensor, ...]]]
    want: Callable[[Operands], tuple[Tensor, ...]]
    touched: Callable[[int, int, int, int], int]
    masked: bool = False
    ours: bool = True


def _forward(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    from lora_kernels.kernels.passes import branch_pass

    seed, y = _seed(problem.case), torch.empty_like(o.dy)

    def run() -> tuple[Tensor, ...]:
        h, _ = branch_pass(o.x, o.a, seed, o.p, o.b, None, None, SCALING, y)
        return h, y

    return run


def _want_forward(o: Operands) -> tuple[Tensor, ...]:
    h = o.dropped(o.x) @ o.a.T
    return h, h @ o.b.T * SCALING


def _dy_pass(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    from lora_kernels.kernels.passes import dy_pass

    def run() -> tuple[Tensor, ...]:
        u, db = dy_pass(o.dy, o.b, o.h, None, SCALING)
        assert db is not None
        return u, db

    return run


def _x_pass(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    from lora_kernels.kernels.passes import x_pass

    def run() -> tuple[Tensor, ...]:
        dx, da = x_pass(o.x, o.u, o.a, o.mask, o.p, True)
        assert dx is not None and da is not None
        return dx, da

    return run


def _copy(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    out = torch.empty_like(o.x)
    return lambda: (out.copy_(o.x),)


def _gemm_forward(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    y = o.dy.clone()
    return lambda: (y.addmm_(o.x, o.weight.T),)


def _gemm_backward(problem: Problem, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    dx = o.x.clone()
    return lambda: (dx.addmm_(o.dy, o.weight),)


PASSES = {
    COPY: Pass(_copy, lambda o: (o.x,), lambda m, k, n, r: 2 * m * k, ours=False),
    "branch_pass": Pass(
        *(_forward, _want_forward, lambda m, k, n, r: m * k + r * k + n * r + m * r + m * n), masked=True
    ),
    "gemm_into_y": Pass(
        *(_gemm_forward, lambda o: (o.dy + o.x @ o.weight.T,)),
        lambda m, k, n, r: m * k + n * k + 2 * m * n,
        ours=False,
    ),
    "dy_pass": Pass(
        *(_dy_pass, lambda o: (o.dy @ o.b * SCALING, o.dy.T @ o.h * SCALING)),
        lambda m, k, n, r: m * n + 2 * n * r + 2 * m * r,
    ),
    "x_pass": Pass(
        *(_x_pass, lambda o: (o.dropped(o.u @ o.a), o.u.T @ o.dropped(o.x))),
        lambda m, k, n, r: 2 * m * k + 2 * r * k + m * r,
        masked=True,
    ),
    "gemm_into_dx": Pass(
        *(_gemm_backward, lambda o: (o.x + o.dy @ o.weight,)),
        lambda m, k, n, r: m * n + n * k + 2 * m * k,
        ours=False,
    ),
}


def floor_bytes(name: str, case: Case) -> int:
    """Bytes that the pass must read or write, each once."""
    one = PASSES[name]
    elements = one.touched(case.rows, case.cols, case.out, case.rank)
    bits = case.rows * -(-case.cols // 8) if one.masked and case.dropout_p else 0
    return elements * case.dtype.itemsize + bits


def _provider(name: str, one: Pass) -> Provider:
    def build(problem: Problem) -> Runner:
        run = one.build(problem, _operands(problem))
        return Runner(lambda x: run())

    def missing(case: Case, mode: str) -> str | None:
        if one.ours and case.device == "cpu":
            return "its kernels are not timed in Triton's interpreter"
        return unavailable("triton", case.device, case.dtype, case.rank) if one.ours else None

    return Provider(name, build, missing)


def check(provider: Provider, case: Case) -> str | None:
    """Why a pass is wrong, or ``None``."""
    problem, want = make_problem(case), PASSES[provider.name].want
    exact = want(_operands(problem, wide=True))
    eager = errors(want(_operands(problem)), exact)
    allowed = [max(2 * error, 4 * torch.finfo(case.dtype).eps) for error in eager]
    names = tuple(f"result {place}" for place in range(len(exact)))
    return judge(provider.build(problem).call(problem.x), exact, allowed, names)


def moved_over_floor(row: Row) -> float | None:
    """Bytes that the launch moves by its grid and tiles, partial sums included, over the floor."""
    if not PASSES[row.provider].ours:
        return None
    try:
        traffic = importlib.import_module("lora_kernels.kernels.traffic")
    except ImportError:
        return None
    case = row.plan.case
    op = "lora_linear" if row.provider == "branch_pass" else "lora_linear_backward"
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(case.dtype, "fp32")
    card = planner.card(torch.device(case.device))
    problem = planner.Problem(op, case.rows, case.cols, case.out, case.rank, dtype, card, case.dropout_p > 0)
    counted = getattr(traffic, row.provider)(problem, planner.Plan("beta"))
    return counted.memory / floor_bytes(row.provider, case)


def gigabytes_per_second(row: Row) -> float | None:
    """Of the bytes that the pass must move."""
    return floor_bytes(row.provider, row.plan.case) / row.time.median / 1e3 if row.time else None


def over_floor(row: Row) -> float | None:
    """Time over that of the same number of bytes at the rate of the copy."""
    ratio, case = row.ratios.get(COPY), row.plan.case
    return None if ratio is None else ratio * floor_bytes(COPY, case) / floor_bytes(row.provider, case)


def training_plans(device: str, quick: bool) -> list[Plan]:
    if device != "cuda" and not quick:
        return []
    shapes = ((64, (64, 48)),) if quick else itertools.product((8192,), LLAMA_3_8B)
    ranks = (16,) if quick else (16, 64)
    return [
        Plan(
            Case(m, *sizes, r, torch.bfloat16, p, device),
            "pass",
            plotted=r == 16,
            priority=1 if r == 16 else 5,
        )
        for (m, sizes), r, p in itertools.product(shapes, ranks, (0.1, 0.0))
    ]


BENCHMARK = Benchmark(
    op="beta_passes",
    plans={TRAINING: training_plans},
    modes=(
        Mode("pass", "pass", work=lambda runner, problem: (lambda: None, lambda _: runner.call(problem.x))),
    ),
    providers=tuple(_provider(name, one) for name, one in PASSES.items()),
    baselines={COPY: "copy of x"},
    problem=make_problem,
    check=check,
    derived=(
        Derived("floor MB", lambda row: floor_bytes(row.provider, row.plan.case) / 1e6, 1),
        Derived("moved / floor", moved_over_floor),
        Derived("GB/s", gigabytes_per_second, 0),
        Derived("time / floor", over_floor),
    ),
)
