"""How each mode is measured, and the loop that measures plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.timers import (
    CudaTimer,
    HostTimer,
    Prepare,
    Run,
    Sampler,
    Timer,
    interleave,
    paired_ratio,
    summarize,
)

from .suites import Benchmark, Mode, Plan, Provider, Row, Runner

OVERHEAD_CALLS = 100


def tensors(value: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _forward(runner: Runner, problem: Any) -> tuple[Prepare, Run]:
    return lambda: None, lambda _: runner.call(problem.x)


def _backward(runner: Runner, problem: Any) -> tuple[Prepare, Run]:
    inputs = (*tensors(problem.x), *runner.factors)
    # A captured run is replayed on one forward pass; on the host each sample has its own.
    keep = problem.case.device == "cuda"

    def run(y: Any) -> object:
        return torch.autograd.grad(tensors(y), inputs, tensors(problem.dy), retain_graph=keep)

    return lambda: runner.call(problem.x), run


def _both(runner: Runner, problem: Any) -> tuple[Prepare, Run]:
    prepare, run = _backward(runner, problem)
    return lambda: None, lambda _: run(prepare())


def _storages(tensor: Tensor) -> list[Any]:
    """Of a sparse tensor those of its indices and of its values."""
    parts = (tensor,) if tensor.layout is torch.strided else (tensor._indices(), tensor._values())
    return [part.untyped_storage() for part in parts]


def saved_bytes(runner: Runner, problem: Any) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, the layer's own parameters aside.

    x counts where it is kept: in a model it is the output of the layer before.
    """
    own = {s.data_ptr() for t in (*tensors(problem.weight), *runner.factors) for s in _storages(t)}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        kept.update({s.data_ptr(): s.nbytes() for s in _storages(tensor) if s.data_ptr() not in own})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner.call(problem.x)
    return sum(kept.values())


def peak_memory(runner: Runner, problem: Any) -> int:
    """Bytes of CUDA memory that a forward and backward pass needs above what is there before it."""
    _, run = _both(runner, problem)
    run(None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = run(None)
    torch.cuda.synchronize()
    del grads
    return torch.cuda.max_memory_allocated() - before


def host_peak(runner: Runner, problem: Any) -> int:
    """Bytes of the CPU's allocator that a forward and backward pass needs above what is there before it."""
    _, run = _both(runner, problem)
    run(None)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run(None)
    changes = [
        event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(0, *itertools.accumulate(changes))


FORWARD = Mode("forward", "timed", work=_forward, plotted=False)
BACKWARD = Mode("backward", "timed", work=_backward, plotted=False)
BOTH = Mode("both", "timed", work=_both)
OVERHEAD_FORWARD = Mode("overhead_forward", "overhead", work=_forward, calls=OVERHEAD_CALLS, plotted=False)
OVERHEAD = Mode("overhead", "overhead", work=_both, calls=OVERHEAD_CALLS)
SAVED_BYTES = Mode("saved_bytes", "bytes", count=saved_bytes)
HOST_PEAK = Mode("peak_memory", "bytes", count=host_peak)
PEAK_MEMORY = Mode("peak_memory", "bytes", count=peak_memory)


@dataclass
class Results:
    """What was measured, by benchmark; why the rest was not; who gave wrong results."""

    rows: list[tuple[Benchmark, Row]] = field(default_factory=list)
    missing: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    wrong: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, benchmark: Benchmark, *rows: Row) -> None:
        self.rows += [(benchmark, row) for row in rows]


class Bench:
    """Runs plans; remembers which providers passed their checks."""

    def __init__(self, repeats: int, wanted: Callable[[str], bool] = lambda label: True) -> None:
        self.repeats = repeats
        self.wanted = wanted
        self.results = Results()
        self._verdicts: dict[tuple[str, str, Any], str | None] = {}

    def run(self, benchmark: Benchmark, plan: Plan, after_round: Callable[[], object] = lambda: None) -> None:
        """Measures ``plan`` for every wanted provider that is here and right."""
        problem = benchmark.problem(plan.case)
        mode = benchmark.mode(plan.mode)
        runners = dict(self._runners(benchmark, plan, problem))
        if mode.count is not None:
            counts = self._each(benchmark, plan, runners, lambda runner: _count(mode, runner, problem))
            self.results.add(benchmark, *_byte_rows(benchmark, plan, counts))
            return
        timer = _timer(mode, plan.case.device)
        samplers = self._each(benchmark, plan, runners, lambda r: _sampler(timer, mode, r, problem))
        samples = interleave(samplers, self.repeats, after_round=after_round)
        self.results.add(benchmark, *_time_rows(benchmark, plan, samples))

    def _each(
        self,
        benchmark: Benchmark,
        plan: Plan,
        runners: dict[str, Runner],
        make: Callable[[Runner], Any],
    ) -> dict[str, Any]:
        """``make`` of every runner; one that fails is refused, and the others go on."""
        made = {}
        for name, runner in runners.items():
            try:
                made[name] = make(runner)
            except Exception as error:
                self._refuse(name, _reason(error), benchmark.label(plan))
        return made

    def _refuse(self, provider: str, why: str, label: str) -> None:
        self.results.wrong.setdefault((provider, why), []).append(label)

    def _runners(self, benchmark: Benchmark, plan: Plan, problem: Any) -> Iterator[tuple[str, Runner]]:
        for provider in benchmark.providers:
            label = benchmark.label(plan, provider.name)
            asked = self.wanted(label) and benchmark.runs(plan, provider.name)
            if not (asked or provider.name in benchmark.baselines):
                continue
            where = benchmark.label(plan)
            why = provider.missing(plan.case, plan.mode)
            if why is not None:
                self.results.missing.setdefault((provider.name, why), []).append(where)
                continue
            why = self._verdict(benchmark, provider, plan.case)
            if why is not None:
                self._refuse(provider.name, why, where)
                continue
            yield provider.name, provider.build(problem)

    def _verdict(self, benchmark: Benchmark, provider: Provider, case: Any) -> str | None:
        key = (benchmark.op, provider.name, case)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = benchmark.check(provider, case)
            except Exception as error:
                self._verdicts[key] = _reason(error)
        return self._verdicts[key]


def _reason(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}"


def _byte_rows(benchmark: Benchmark, plan: Plan, counts: dict[str, int]) -> Iterator[Row]:
    for name, value in counts.items():
        ratios = {base: _ratio(value, counts.get(base)) for base in benchmark.baselines}
        yield Row(name, plan, None, value, ratios)


def _time_rows(benchmark: Benchmark, plan: Plan, samples: dict[str, list[float]]) -> Iterator[Row]:
    for name, taken in samples.items():
        ratios = {
            base: paired_ratio(taken, samples[base]) if base in samples else None
            for base in benchmark.baselines
        }
        yield Row(name, plan, summarize(taken), None, ratios)


def _ratio(value: int, base: int | None) -> float | None:
    return value / base if base else None


def _timer(mode: Mode, device: str) -> Timer:
    if mode.calls:
        return HostTimer(mode.calls, device)
    return CudaTimer() if device == "cuda" else HostTimer()


def _sampler(timer: Timer, mode: Mode, runner: Runner, problem: Any) -> Sampler:
    """The mode's work inside the provider's context, which is not timed."""
    assert mode.work is not None
    with runner.context():
        sample = timer.sampler(*mode.work(runner, problem))

    def in_context() -> float:
        with runner.context():
            return sample()

    return in_context


def _count(mode: Mode, runner: Runner, problem: Any) -> int:
    assert mode.count is not None
    with runner.context():
        return mode.count(runner, problem)
