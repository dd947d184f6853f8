"""Plans for the delta of a mixed batch: ``add_multi_lora_`` and its rivals, beside the floor of bytes."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.testing.timers import Prepare, Run

from .checks import errors, judge
from .serving_providers import PROVIDERS, ServingCase, ServingProblem, exact, floor_bytes, make_problem
from .suites import SERVING, Benchmark, Derived, Goal, Mode, Plan, Provider, Row, Runner

ROWS = (1, 8, 32, 64, 128, 256)
# Which patterns say something about how many adapters are resident: one, a quarter of the rows, each row's.
SPREAD = ("uniform", "zipf", "skewed")
QKV = (4096, 1024, 1024)
# A copy of this many bytes measures the bandwidth: larger than any cache.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
WARM_CALLS = 10


def _once(runner: Runner, problem: ServingProblem) -> tuple[Prepare, Run]:
    return lambda: None, lambda _: runner.call(problem.x)


def _in_a_row(runner: Runner, problem: ServingProblem) -> tuple[Prepare, Run]:
    def run(_: object) -> None:
        for _ in range(WARM_CALLS):
            runner.call(problem.x)

    return lambda: None, run


# On CUDA one replay of a graph after the L2 cache was overwritten; on a CPU as it comes.
DELTA = Mode("delta", "timed", work=_once)
# Ten calls in one graph, of which nine find in L2 what fits there.
TEN = Mode("ten_deltas", "ten in a row", work=_in_a_row, plotted=False)


def _grid(rows: int) -> Iterator[tuple[int, str]]:
    """(resident adapters, pattern) for a number of rows."""
    yield 1, "identical"
    if rows > 1:
        yield rows, "distinct"
        quarter = max(2, rows // 4)
        yield from ((quarter, pattern) for pattern in SPREAD)


def cpu_plans(quick: bool) -> list[Plan]:
    """4096², fp32: the cells with figures to reach, the numbers of rows and adapters, mixed ranks, slices."""
    if quick:
        small = {"cols": 64, "rank": 0}
        cases = [
            ServingCase(6, 3, "zipf", outs=(48,), **small),
            ServingCase(4, 4, "distinct", outs=(32, 16, 16), **small),
        ]
        return [Plan(case, DELTA.name) for case in cases]
    first = [(32, 32, "distinct", 16), (32, 32, "distinct", 64), (128, 32, "uniform", 16)]
    small = [(1, 1, "identical", 16), (8, 2, "uniform", 16), (8, 8, "distinct", 16), (8, 8, "distinct", 0)]
    shared = [(32, 1, "identical", 16), (32, 1, "identical", 64), (256, 1, "identical", 16)]
    spread = [(32, 8, pattern, 16) for pattern in SPREAD] + [(32, 8, "zipf", 8), (32, 8, "zipf", 0)]
    many = [
        (64, 64, "distinct", 16),
        (128, 128, "distinct", 16),
        (256, 64, "zipf", 16),
        (128, 32, "zipf", 64),
    ]
    cases = [ServingCase(*cell) for cell in (*first, *small, *shared, *spread, *many)]
    cases += [ServingCase(32, 8, "zipf", 16, outs=outs) for outs in (QKV, (14336,))]
    return [Plan(case, DELTA.name, priority=0 if i < len(first) else 1) for i, case in enumerate(cases)]


def cuda_plans(quick: bool) -> list[Plan]:
    """The whole grid in bf16. By priority: r=16 on 4096², r=64 and the wide one, slices, other ranks."""
    plans = []
    for rows in (8,) if quick else ROWS:
        for adapters, pattern in _grid(rows):
            for rank, outs in ((r, o) for r in (16, 64, 0, 8) for o in ((4096,), (14336,), QKV)):
                case = ServingCase(rows, adapters, pattern, rank, 4096, outs, torch.bfloat16, "cuda")
                first = 0 if (rank, outs) == (16, (4096,)) else 1 if outs != QKV and rank in (16, 64) else 2
                last = 3 if rank in (0, 8) else first
                plans.append(Plan(case, DELTA.name, plotted=first == 0, priority=last))
                if outs == (4096,) and rank in (16, 64):
                    plans.append(Plan(case, TEN.name, plotted=False, priority=3))
    return plans


def plans(device: str, quick: bool) -> list[Plan]:
    """The serving suite of a device."""
    return cuda_plans(quick) if device == "cuda" else cpu_plans(quick)


@functools.lru_cache(maxsize=1)
def _reference(case: ServingCase) -> tuple[ServingProblem, Tensor, float]:
    """The problem, its exact result, and the error of the loop in the case's dtype."""
    problem = make_problem(case)
    want = exact(problem)
    loop = next(provider for provider in PROVIDERS if provider.name == "loop").build(problem)
    return problem, want, errors((loop.call(problem.x),), (want,))[0]


def check(provider: Provider, case: ServingCase) -> str | None:
    """Why the provider's y is wrong, or ``None``: no further from fp64 than twice the loop over adapters.

    Where the loop happens to be (nearly) exact, a few roundings are still no mistake, and neither is
    another order of the sum in fp32.
    """
    problem, want, loop = _reference(case)
    runner = provider.build(problem)
    with runner.context():
        got = runner.call(problem.x)
    few = max(4 * torch.finfo(case.dtype).eps, 32 * torch.finfo(torch.float32).eps)
    return judge((got,), (want,), [max(2 * loop, few)])


@functools.cache
def bandwidth(device: str) -> float:
    """Bytes a second of a large copy, read and written: the best of a few."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(8):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def floor_us(row: Row) -> float:
    """Microseconds that the bytes of the row's cell take at the bandwidth of a copy."""
    calls = WARM_CALLS if row.plan.mode == TEN.name else 1
    return calls * floor_bytes(row.plan.case) / bandwidth(row.plan.case.device) * 1e6


def _above_floor(row: Row) -> float | None:
    return row.time.median / floor_us(row) if row.time else None


BASELINES = {
    "loop": "loop",
    "peft": "PEFT",
    "vllm_torch": "vLLM torch",
    "vllm_triton": "vLLM Triton",
    "sglang_triton_v2": "SGLang v2",
}
CELLS = (
    ("B32-D32-distinct/4096x4096/r16/float32", 1 / 2),
    ("B128-D32-uniform/4096x4096/r16/float32", 1 / 1.5),
)
GOALS = tuple(
    Goal(f"/ {BASELINES[base]}", cell, DELTA.name, base, limit, "ours_cpp")
    for cell, limit in CELLS
    for base in ("loop", "peft", "vllm_torch")
)

BENCHMARK = Benchmark(
    op="multi_lora_linear",
    plans={SERVING: plans},
    modes=(DELTA, TEN),
    providers=PROVIDERS,
    baselines=BASELINES,
    problem=make_problem,
    check=check,
    goals=GOALS,
    derived=(
        Derived("MB", lambda row: floor_bytes(row.plan.case) / 1e6),
        Derived("floor µs", floor_us),
        Derived("/ floor", _above_floor),
    ),
)
