"""Times the strategies of ``lora_linear`` on one problem, and keeps the times in a table of plans.

A plan is timed only after its results were held against eager PyTorch and fp64; one that does not
compile, does not fit the card or is not exact is left out, with the reason.
"""

from __future__ import annotations

import importlib
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _cpu_ways, planner
from ._arguments import LoraBackward, LoraInputs
from .kernels import traffic
from .planner import Entry, Plan, Problem, Table
from .reference import dropout as reference_dropout
from .reference import lora_linear as reference
from .testing.assertions import assert_close
from .testing.timers import Sampler, Timer, interleave

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DROPOUT_P = 0.1
SCALING = 2.0
_NEEDS = [True, True, True, False, False]
# The first of each strategy is its default tile.
FORWARD = (
    Plan("beta"),
    Plan("beta", {"forward": {"block_m": 32}}),
    Plan("beta", {"forward": {"block_m": 128}}),
    Plan("kext"),
    Plan("kext", {"gemm": {"block_c": 128, "num_stages": 4}}),
    Plan("kext", {"gemm": {"group_m": 16}}),
)
FEW_ROWS = (
    Plan("single"),
    Plan("single", {"single": {"block_c": 16}}),
    Plan("single", {"single": {"block_c": 64}}),
)
BACKWARD = (
    Plan("beta"),
    Plan("beta", {"dy": {"num_stages": 4}, "x": {"block_c": 128}}),
    Plan("beta", {"dy": {"block_c": 256}}),
    Plan("kext"),
    Plan("kext", {"gemm": {"block_c": 128, "num_stages": 4}}),
)


@dataclass(frozen=True)
class Result:
    """The times of one problem (``None`` where no plan ran), and why plans were left out."""

    problem: Problem
    entry: Entry | None
    failed: tuple[tuple[Plan, str], ...]


class Work:
    """One plan on one problem: what a timer calls."""

    def __init__(self, plan: Plan, args: LoraInputs | LoraBackward, op: str) -> None:
        module = importlib.import_module(f".kernels.{plan.strategy}", __package__)
        self.plan, self._args = plan, args
        self._run = module.backward if op.endswith("backward") else module.forward

    def __call__(self, _: Any = None) -> Sequence[Tensor]:
        return self._run(self.plan, self._args)


def plans(problem: Problem) -> tuple[Plan, ...]:
    """The strategies and tiles to try."""
    if problem.op.endswith("backward"):
        return BACKWARD
    return (*FORWARD, *FEW_ROWS) if problem.rows <= 256 and problem.rank <= 128 else FORWARD


def measure(problem: Problem, device: torch.device, timer: Timer, repeats: int) -> Result:
    """Checks and times every plan of the problem, interleaved; the median of each counts."""
    args = operands(problem, device)
    wanted = _expected(problem, args)
    samplers: dict[str, Sampler] = {}
    tried: dict[str, Plan] = {}
    failed = []
    for plan in plans(problem):
        work = Work(plan, args, problem.op)
        try:
            _judge(work(), *wanted)
            samplers[str(len(tried))] = timer.sampler(lambda: None, work)
        except Exception as error:  # the card's, the compiler's or the check's: any of them rules it out
            failed.append((plan, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        tried[str(len(tried))] = plan
    samples = interleave(samplers, repeats)
    times = tuple((plan, statistics.median(samples[name])) for name, plan in tried.items())
    return Result(problem, Entry(problem, times) if times else None, tuple(failed))


def operands(problem: Problem, device: torch.device) -> LoraInputs | LoraBackward:
    """The arguments of the op, of order one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, cols, device=device, generator=generator) * scale
        return values.to(DTYPES[problem.dtype])

    p = problem
    x, dy = normal(p.rows, p.cols), normal(p.rows, p.out)
    weight, a = normal(p.out, p.cols, p.cols**-0.5), normal(p.rank, p.cols, p.cols**-0.5)
    b = normal(p.out, p.rank, p.rank**-0.5)
    seed = torch.full((1,), 7, dtype=torch.int64, device=device) if p.dropout else None
    dropout_p = DROPOUT_P if p.dropout else 0.0
    if not p.op.endswith("backward"):
        return LoraInputs(x, weight, a, b, seed=seed, scaling=SCALING, dropout_p=dropout_p)
    mask = None if seed is None else reference_dropout.dropout_mask(seed, p.rows, p.cols, dropout_p)
    dropped = x if mask is None else reference_dropout.dropout_apply(x, mask, dropout_p)
    h = dropped @ a.T
    return LoraBackward(dy, x, weight, a, b, h, None, mask, SCALING, dropout_p, False, _NEEDS)


def _expected(problem: Problem, args: tuple[Any, ...]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What eager PyTorch gives, in the problem's dtype and in fp64."""
    op = getattr(reference, problem.op)
    wide = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return op(*args), op(*wide)


def _judge(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for i, (mine, plain, wide) in enumerate(zip(got, eager, exact, strict=True)):
        if mine.is_floating_point():
            assert_close(mine, plain, wide, f"result {i}")
        elif not torch.equal(mine, plain):
            raise AssertionError(f"result {i}: the keep bits differ")


def predict(wanted: Sequence[Problem], card: str) -> Table:
    """What byte counts say of the default tile of each strategy, where nothing was measured."""
    entries = []
    for problem in wanted:
        defaults = [plan for plan in plans(problem) if not plan.tile]
        times = tuple((plan, round(traffic.predict(problem, plan), 2)) for plan in defaults)
        entries.append(Entry(problem, times))
    return Table(card, "predicted", tuple(entries))


def save_ways(path: Path, times: _cpu_ways.Times) -> None:
    """Adds the times to the table in ``path``; this process goes by them where that is its table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = _cpu_ways.read(path)
    merged = {op: {**known.get(op, {}), **times.get(op, {})} for op in _cpu_ways.OPS}
    write(path, _cpu_ways.to_text({op: classes for op, classes in merged.items() if classes}))
    _cpu_ways.settle()


def save(path: Path, card: str, entries: Sequence[Entry]) -> None:
    """Adds the entries to the table in ``path``, in place of those of the same problems.

    The file changes at once or not at all, and this process plans by it from the next call on.
    """
    new = {entry.problem for entry in entries}
    kept = [entry for entry in _existing(path, card) if entry.problem not in new]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    made = f"lora-kernels tune on {device}, torch {torch.__version__}; medians, microseconds"
    write(path, planner.to_text(Table(card, "measured", (*kept, *entries)), made))
    planner.refresh()


def write(path: Path, text: str) -> None:
    """Puts the text into the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _existing(path: Path, card: str) -> tuple[Entry, ...]:
    """The entries of a sound table of measurements; any other file is replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = planner.read(path, card)
    return table.entries if table is not None and table.kind == "measured" else ()
