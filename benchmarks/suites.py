"""What a benchmark module brings, and which modules there are.

A benchmark joins with one module ``bench_<op>.py`` and one line in ``MODULES`` below. The module defines

    BENCHMARK = Benchmark(
        op="my_op",                               # first word of every label that --filter sees
        plans={"training": training_plans},       # by suite: (device, quick) -> [Plan(case, mode), ...]
        modes=(FORWARD, BACKWARD, BOTH),          # of measure.py, or Mode(...) of its own
        providers=(Provider("frozen", build), ...),
        baselines={"frozen": "frozen"},           # provider -> its heading: a ratio column for each
        problem=make_problem,                     # case -> the tensors that all providers share
        check=check,                              # (provider, case) -> why its result is wrong, or None
        goals=(Goal(...),),                       # optional: figures to reach
        derived=(Derived("tokens/s", rate),),     # optional: columns computed from a row
    )

* **Suites.** A suite is a name that some module has plans for; ``default`` is what runs without ``--suite``.
  ``training`` and ``serving`` are each one run of at most ten minutes on a GPU. Figures of a CPU that are to
  be committed by themselves go in a suite named after the op. The results of suite ``s`` on device ``d`` are
  ``d-s.csv``, ``d-s.md`` and ``d-s.png``; of ``default``, ``d.csv`` and so on. Plans run by their
  ``priority``, 0 first, and in the order given where it is equal: what ``--budget-seconds`` leaves no time
  for is listed as left out.
* **Case.** Any frozen, hashable dataclass with the members of :class:`Case`. ``providers.Case`` (rows, cols,
  out, rank, dtype, dropout_p, device) may be imported or inherited from.
* **Problem and Runner.** ``Provider.build(problem)`` returns a :class:`Runner`. The modes FORWARD, BACKWARD,
  BOTH, OVERHEAD*, SAVED_BYTES and PEAK_MEMORY of ``measure.py`` ask of a problem ``x``, ``dy`` (one tensor
  or a tuple, as ``call`` returns) and ``weight`` (one tensor or a tuple: not counted as saved), and
  differentiate with respect to ``x`` and the runner's ``factors``. A mode of another kind is
  ``Mode("decode", "timed", work=lambda runner, problem: (prepare, run))``.
* **Checks.** Nothing is measured for a provider whose ``check`` returns a reason. ``checks.judge`` and
  ``checks.errors`` compare with fp64 and twice eager's error.
* **Rivals.** A provider that cannot run here says why in ``missing(case, mode)``; it is then listed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lora_kernels.testing.timers import Prepare, Run, Summary

# One line a benchmark, in the order of the report.
MODULES = (
    "bench_lora_linear",
    "bench_dora_linear",
    "bench_lora_linear_group",
    "bench_llama_layer",
    "bench_beta_passes",
    "bench_multi_lora_linear",
    "bench_quantized_linear",
    "bench_optimizers",
    "bench_schedules",
    "bench_starts",
    "bench_methods",
    "bench_routing",
    "bench_experts",
    "bench_peft_tuners",
    "bench_compose",
)
DEFAULT, TRAINING, SERVING = "default", "training", "serving"


class Case(Hashable, Protocol):
    """One point of a benchmark: its sizes."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def label(self) -> str:
        """Short and unique within the op, parts split by ``/``: what ``--filter`` and goals match."""

    @property
    def title(self) -> str:
        """The heading of its table."""

    @property
    def columns(self) -> Mapping[str, object]:
        """Its columns of the CSV."""


@dataclass(frozen=True)
class Runner:
    """A provider on one problem: ``call(x)`` is y; ``factors`` are its A and B, none if it has none."""

    call: Callable[[Any], Any]
    factors: tuple[Tensor, ...] = ()
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def never(case: Any, mode: str) -> str | None:
    """The provider runs everywhere."""
    return None


@dataclass(frozen=True)
class Provider:
    """An implementation: how to build it, and why not where it cannot run.

    ``needs_dropout``: it has no path without dropout, so its values are checked with one that drops nothing.
    """

    name: str
    build: Callable[[Any], Runner]
    missing: Callable[[Any, str], str | None] = never
    needs_dropout: bool = False


@dataclass(frozen=True)
class Mode:
    """What is measured of a runner: a time, or a count of bytes.

    Args:
        name: as in labels and tables.
        kind: modes of one kind stand in one table.
        work: of a time, (prepare, run): ``prepare()`` is not timed, its result goes to ``run``.
        count: of bytes, the number.
        calls: host time per call over so many calls, where it is not 0; else device time.
        plotted: whether the plot shows it.
    """

    name: str
    kind: str
    work: Callable[[Runner, Any], tuple[Prepare, Run]] | None = None
    count: Callable[[Runner, Any], int] | None = None
    calls: int = 0
    plotted: bool = True


@dataclass(frozen=True)
class Plan:
    """One case in one mode, for all providers or for those named; the baselines always join.

    Plans of priority 0 run first.
    """

    case: Any
    mode: str
    providers: frozenset[str] | None = None
    plotted: bool = True
    priority: int = 0


@dataclass(frozen=True)
class Row:
    """One measured figure: a time or a number of bytes, and its ratio to each baseline."""

    provider: str
    plan: Plan
    time: Summary | None = None
    bytes: int | None = None
    ratios: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """A figure to reach: ``provider``'s ratio to ``base`` in one cell.

    ``base`` is a baseline, or for bytes any provider.
    """

    text: str
    case: str
    mode: str
    base: str
    limit: float
    provider: str


@dataclass(frozen=True)
class Derived:
    """A column computed from a row, left empty where it is ``None``."""

    name: str
    value: Callable[[Row], float | None]
    digits: int = 2


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One op: what is measured, who is measured, against whom, and who checks it. See the module's text."""

    op: str
    plans: Mapping[str, Callable[[str, bool], Iterable[Plan]]]
    modes: tuple[Mode, ...]
    providers: tuple[Provider, ...]
    baselines: Mapping[str, str]
    problem: Callable[[Any], Any]
    check: Callable[[Provider, Any], str | None]
    goals: tuple[Goal, ...] = ()
    derived: tuple[Derived, ...] = ()

    def mode(self, name: str) -> Mode:
        """The mode of that name."""
        return next(mode for mode in self.modes if mode.name == name)

    def label(self, plan: Plan, provider: str = "") -> str:
        """OP/CASE/MODE, or OP/CASE/MODE/PROVIDER."""
        parts = (self.op, plan.case.label, plan.mode, provider)
        return "/".join(part for part in parts if part)

    def runs(self, plan: Plan, provider: str) -> bool:
        """Whether the plan is for that provider, as a baseline or by name."""
        return plan.providers is None or provider in plan.providers or provider in self.baselines


def benchmarks() -> tuple[Benchmark, ...]:
    """All benchmarks, imported now."""
    return tuple(importlib.import_module(f".{name}", __package__).BENCHMARK for name in MODULES)


def suites(known: Iterable[Benchmark]) -> tuple[str, ...]:
    """The names of all suites, ``default`` first."""
    return tuple(dict.fromkeys((DEFAULT, *(name for one in known for name in one.plans))))


def file_stem(suite: str, device: str) -> str:
    """The name of a suite's result files, without the ending."""
    return device if suite == DEFAULT else f"{device}-{suite}"
