"""Measures ``lora_linear`` and its rivals: what to measure, and how each mode is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.timers import (
    CudaTimer,
    HostTimer,
    Sampler,
    Summary,
    Timer,
    interleave,
    paired_ratio,
    summarize,
)

from .checks import check
from .providers import FROZEN, PEFT, PROVIDERS, Case, Problem, Provider, Runner, make_problem

OP = "lora_linear"
TIMED = ("forward", "backward", "both")
OVERHEAD = ("overhead_forward", "overhead")
BYTES = ("saved_bytes", "peak_memory")
BASELINES = (FROZEN, PEFT)
OVERHEAD_CALLS = 100


@dataclass(frozen=True)
class Plan:
    """One case in one mode."""

    case: Case
    mode: str

    @property
    def label(self) -> str:
        return f"{OP}/{self.case.label}/{self.mode}"


@dataclass(frozen=True)
class Row:
    """One measured figure: a time with its ratios, or a number of bytes."""

    provider: str
    plan: Plan
    time: Summary | None = None
    bytes: int | None = None
    ratio_frozen: float | None = None
    ratio_peft: float | None = None


@dataclass
class Results:
    """What was measured; why the rest was not; who gave wrong results."""

    rows: list[Row] = field(default_factory=list)
    missing: dict[tuple[str, str], list[Plan]] = field(default_factory=dict)
    wrong: dict[tuple[str, str], list[Plan]] = field(default_factory=dict)


def cpu_plans(quick: bool) -> list[Plan]:
    rows, wide, narrow = (32, 128, 64) if quick else (512, 2048, 1024)
    timed = [Case(rows, wide, wide, dropout_p=p) for p in (0.0, 0.1)] + [Case(rows, narrow, narrow)]
    plans = [Plan(case, mode) for case in timed for mode in TIMED]
    plans += [Plan(Case(1, 64, 64), mode) for mode in OVERHEAD]
    saved = (128, 256, 256) if quick else (8192, 4096, 4096)
    half = [Case(*saved, dtype=torch.bfloat16, dropout_p=p) for p in (0.1, 0.0)]
    return plans + [Plan(case, "saved_bytes") for case in half]


def cuda_plans(quick: bool) -> list[Plan]:
    rows, width, ranks = ((256,), 512, (16,)) if quick else ((512, 2048, 8192), 4096, (16, 64))
    cases = [
        Case(m, width, width, rank=r, dtype=torch.bfloat16, dropout_p=p, device="cuda")
        for m in rows
        for r in ranks
        for p in (0.0, 0.1)
    ]
    plans = [Plan(case, mode) for case in cases for mode in (*TIMED, *BYTES)]
    return plans + [Plan(Case(1, 64, 64, dtype=torch.bfloat16, device="cuda"), mode) for mode in OVERHEAD]


def plans(device: str, quick: bool) -> list[Plan]:
    """The default plans of a device."""
    return cuda_plans(quick) if device == "cuda" else cpu_plans(quick)


class Bench:
    """Runs plans; remembers which providers passed their checks."""

    def __init__(self, repeats: int, wanted: Callable[[Plan, str], bool], providers: Any = PROVIDERS) -> None:
        self.repeats = repeats
        self.wanted = wanted
        self.providers: tuple[Provider, ...] = tuple(providers)
        self.results = Results()
        self._verdicts: dict[tuple[str, Case], str | None] = {}

    def run(self, plan: Plan, after_round: Callable[[], object] = lambda: None) -> None:
        """Measures ``plan`` for every wanted provider that is here and right."""
        problem = make_problem(plan.case)
        runners = dict(self._runners(plan, problem))
        if plan.mode in BYTES:
            self._add_bytes(plan, {name: _count(plan, runner, problem) for name, runner in runners.items()})
            return
        timer = _timer(plan)
        samplers = {name: _sampler(timer, plan, runner, problem) for name, runner in runners.items()}
        self._add_times(plan, interleave(samplers, self.repeats, after_round=after_round))

    def _runners(self, plan: Plan, problem: Problem) -> Iterator[tuple[str, Runner]]:
        for provider in self.providers:
            if not (self.wanted(plan, provider.name) or provider.name in BASELINES):
                continue
            why = provider.missing(plan.case, plan.mode)
            if why is not None:
                self.results.missing.setdefault((provider.name, why), []).append(plan)
                continue
            why = self._verdict(provider, plan.case)
            if why is not None:
                self.results.wrong.setdefault((provider.name, why), []).append(plan)
                continue
            yield provider.name, provider.build(problem)

    def _verdict(self, provider: Provider, case: Case) -> str | None:
        key = (provider.name, case)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = check(provider, case)
            except Exception as error:
                self._verdicts[key] = f"{type(error).__name__}: {_first_line(error)}"
        return self._verdicts[key]

    def _add_bytes(self, plan: Plan, values: dict[str, int]) -> None:
        for name, value in values.items():
            ratios = (_ratio(value, values.get(base)) for base in BASELINES)
            self.results.rows.append(Row(name, plan, None, value, *ratios))

    def _add_times(self, plan: Plan, samples: dict[str, list[float]]) -> None:
        for name, taken in samples.items():
            ratios = (paired_ratio(taken, samples[b]) if b in samples else None for b in BASELINES)
            self.results.rows.append(Row(name, plan, summarize(taken), None, *ratios))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _ratio(value: int, base: int | None) -> float | None:
    return value / base if base else None


def _timer(plan: Plan) -> Timer:
    if plan.mode in OVERHEAD:
        return HostTimer(OVERHEAD_CALLS, plan.case.device)
    return CudaTimer() if plan.case.device == "cuda" else HostTimer()


def _sampler(timer: Timer, plan: Plan, runner: Runner, problem: Problem) -> Sampler:
    """The mode as (prepare, run), inside the provider's context, which is not timed."""
    x, dy, inputs = problem.x, problem.dy, (problem.x, *runner.factors)
    keep = plan.case.device == "cuda"

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, inputs, dy, retain_graph=keep)

    work: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "forward": (lambda: None, lambda _: runner.call(x)),
        "backward": (lambda: runner.call(x), backward),
        "both": (lambda: None, lambda _: backward(runner.call(x))),
    }
    mode = {"overhead": "both", "overhead_forward": "forward"}.get(plan.mode, plan.mode)
    with runner.context():
        sample = timer.sampler(*work[mode])

    def in_context() -> float:
        with runner.context():
            return sample()

    return in_context


def _count(plan: Plan, runner: Runner, problem: Problem) -> int:
    with runner.context():
        return saved_bytes(runner, problem) if plan.mode == "saved_bytes" else peak_memory(runner, problem)


def saved_bytes(runner: Runner, problem: Problem) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, the layer's own parameters aside.

    x counts where it is kept: in a model it is the output of the layer before.
    """
    own = {t.untyped_storage().data_ptr() for t in (problem.weight, *runner.factors)}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner.call(problem.x)
    return sum(kept.values())


def peak_memory(runner: Runner, problem: Problem) -> int:
    """Bytes of CUDA memory that a forward and backward pass needs above what is there before it."""
    runner.call(problem.x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = runner.call(problem.x)
    grads = torch.autograd.grad(y, (problem.x, *runner.factors), problem.dy)
    torch.cuda.synchronize()
    del y, grads
    return torch.cuda.max_memory_allocated() - before
