"""Results as CSV, as a markdown table and as a plot; and a progress bar where someone watches."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_kernels import _cpu_version, _cpu_ways, _extension

from .measure import Results
from .suites import Benchmark, Goal, Row

OURS = "ours"
# From so many cases of one mode on, there is an overview.
MANY = 6


@dataclass(frozen=True)
class Conditions:
    """Under what the figures of one run were taken."""

    device: str
    torch: str
    triton: str
    peft: str
    commit: str
    command: str
    timestamp: str
    threads: int
    repeats: int


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def commit() -> str:
    """The commit of the tree, with ``+`` where tracked code differs from it; ``-`` outside of git."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", "..", ":!results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "-"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    bound = " bound to cores" if bound_to_cores() else ""
    return f"{name}, {instruction_set()}, {torch.get_num_threads()} threads{bound}"


def bound_to_cores() -> bool:
    """Whether OpenMP keeps threads of this process on cores of their own, as the system has it."""
    torch.ones(2**20).add_(1.0)  # a loop that starts them
    with contextlib.suppress(OSError, AttributeError):  # no such list, or no such call
        own = os.sched_getaffinity(0)
        return any(not own & os.sched_getaffinity(int(one)) for one in os.listdir("/proc/self/task"))
    return False


# What the environment can hold loops and products to, and what hides AVX-512 (tests/csrc).
LIMITS = (
    "LORA_KERNELS_CPU_VERSION",
    "LORA_KERNELS_CPU_PRODUCTS",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)
HIDING = ("without_avx512.so", "trapped_cpuid.so")


def limits() -> list[str]:
    """Those that are set, as they stand before a command."""
    loaded = os.environ.get("LD_PRELOAD", "") + os.environ.get("LD_AUDIT", "")
    hidden = any(one in loaded for one in HIDING)
    before = ["env $(python tests/csrc/without_avx512.py build/hiding)"] if hidden else []
    return before + [f"{name}={shlex.quote(os.environ[name])}" for name in LIMITS if name in os.environ]


def limited() -> str | None:
    """The instruction set of our loops, where they are held to less than the processor has."""
    if _extension.load() is not None:
        return None
    now = _cpu_ways.instruction_set()
    return None if now == widest() else now


def widest() -> str:
    """The widest instruction set of our loops that this processor has, though CPUID may hide it."""
    with contextlib.suppress(OSError):
        if " avx512vl " in Path("/proc/cpuinfo").read_text():
            return "avx512"
    return _cpu_version.runnable()[0]


def instruction_set() -> str:
    """Of our loops and of PyTorch's, and whether the processor has more."""
    less = limited()  # loads the extension, which then follows the environment
    parts = f"{_cpu_ways.instruction_set()}, torch {torch.backends.cpu.get_cpu_capability()}"
    return f"{widest()} limited to {parts}" if less else parts


def conditions(device: str, command: str, repeats: int) -> Conditions:
    """What holds now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes").removesuffix("+00:00")
    return Conditions(
        device_name(device),
        torch.__version__,
        version("triton"),
        version("peft"),
        commit(),
        command,
        f"{now}Z",
        torch.get_num_threads(),
        repeats,
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _merged(parts: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order of first appearance."""
    return list(dict.fromkeys(name for part in parts for name in part))


def csv_columns(results: Results) -> list[str]:
    """The columns of all cases, baselines and derived figures, between the common ones."""
    used = _merged_benchmarks(results)
    return [
        *("op", "provider", "mode"),
        *_merged(row.plan.case.columns for _, row in results.rows),
        *("median_us", "p20_us", "p80_us", "bytes"),
        *_merged([f"ratio_{base}" for base in benchmark.baselines] for benchmark in used),
        *_merged([column.name for column in benchmark.derived] for benchmark in used),
        *("device", "torch", "triton", "peft", "commit", "command", "timestamp"),
    ]


def _merged_benchmarks(results: Results) -> list[Benchmark]:
    return list(dict.fromkeys(benchmark for benchmark, _ in results.rows))


def csv_row(benchmark: Benchmark, row: Row, under: Conditions) -> dict[str, object]:
    """One line of the CSV; times in microseconds."""
    values: dict[str, object] = {"op": benchmark.op, "provider": row.provider, "mode": row.plan.mode}
    values |= row.plan.case.columns
    if row.time:
        times = (row.time.median, row.time.p20, row.time.p80)
        values |= zip(("median_us", "p20_us", "p80_us"), (_number(t, 2) for t in times), strict=True)
    if row.bytes is not None:
        values["bytes"] = row.bytes
    values |= {f"ratio_{base}": _number(ratio, 4) for base, ratio in row.ratios.items()}
    values |= {c.name: _number(c.value(row), c.digits) for c in benchmark.derived}
    for name in ("device", "torch", "triton", "peft", "commit", "command", "timestamp"):
        values[name] = getattr(under, name)
    return values


def write_csv(path: Path, results: Results, under: Conditions) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, csv_columns(results), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_row(benchmark, row, under) for benchmark, row in results.rows)


def reached(goal: Goal, rows: Iterable[Row]) -> float | None:
    """The figure of ``goal`` among ``rows``, or ``None`` where it was not measured."""
    here = {
        row.provider: row for row in rows if (row.plan.case.label, row.plan.mode) == (goal.case, goal.mode)
    }
    row, base = here.get(goal.provider), here.get(goal.base)
    if row is None:
        return None
    if goal.base in row.ratios:
        return row.ratios[goal.base]
    return row.bytes / base.bytes if base and base.bytes and row.bytes is not None else None


def _goal_lines(results: Results) -> Iterator[str]:
    found = []
    for benchmark in _merged_benchmarks(results):
        rows = [row for owner, row in results.rows if owner is benchmark]
        found += [(goal, value) for goal in benchmark.goals if (value := reached(goal, rows)) is not None]
    if not found:
        return
    yield from ("| figure | shape | at most | measured |", "|---|---|---:|---:|")
    for goal, value in found:
        mark = "" if value <= goal.limit else " (missed)"
        shape = goal.case.split("/")[0]
        yield f"| `{goal.provider}`, {goal.text} | {shape} | {goal.limit:.2f} | {value:.3f}{mark} |"
    yield ""


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.bytes is not None:
        return f"{row.bytes / 2**20:.2f} MiB"
    assert row.time is not None
    unit, scale = ("ms", 1e3) if row.time.median >= 1000 else ("µs", 1.0)
    median, p20, p80 = (v / scale for v in (row.time.median, row.time.p20, row.time.p80))
    return f"{median:.3g} {unit} ({p20:.3g} to {p80:.3g})"


def _table(benchmark: Benchmark, rows: list[Row], modes: list[str]) -> Iterator[str]:
    """Providers down; for each mode the figure, its ratios to the baselines and what is derived from it."""
    cells = {(row.provider, row.plan.mode): row for row in rows}
    derived = [c for c in benchmark.derived if any(c.value(row) is not None for row in rows)]
    beside = [*(f"/ {heading}" for heading in benchmark.baselines.values()), *(c.name for c in derived)]
    heads = [" | ".join([mode.replace("_", " "), *beside]) for mode in modes]
    yield f"| provider | {' | '.join(heads)} |"
    yield f"|---|{'---:|' * (1 + len(beside)) * len(modes)}"
    for provider in dict.fromkeys(row.provider for row in rows):
        line = []
        for mode in modes:
            row = cells.get((provider, mode))
            ratios = [row.ratios.get(base) if row else None for base in benchmark.baselines]
            more = [(c.value(row) if row else None, c.digits) for c in derived]
            numbers = [*((ratio, 2) for ratio in ratios), *more]
            line += [_cell(row), *(_number(value, digits) or "-" for value, digits in numbers)]
        yield f"| `{provider}` | {' | '.join(line)} |"
    yield ""


def _groups(results: Results) -> dict[tuple[Benchmark, str, str], list[Row]]:
    """Rows of one table: one case, and modes of one kind."""
    groups: dict[tuple[Benchmark, str, str], list[Row]] = {}
    for benchmark, row in results.rows:
        kind = benchmark.mode(row.plan.mode).kind
        groups.setdefault((benchmark, row.plan.case.label, kind), []).append(row)
    return groups


def _tables(results: Results) -> Iterator[str]:
    several = len(_merged_benchmarks(results)) > 1
    for (benchmark, _, kind), rows in _groups(results).items():
        op = f"`{benchmark.op}` " if several else ""
        yield from (f"**{op}{rows[0].plan.case.title}**", "")
        modes = [mode.name for mode in benchmark.modes if mode.kind == kind]
        yield from _table(benchmark, rows, [m for m in modes if any(row.plan.mode == m for row in rows)])


def _overview(results: Results) -> Iterator[str]:
    """Where a mode has many cases: one line a case, with every provider's ratio to the first baseline."""
    cells: dict[tuple[Benchmark, str], list[Row]] = {}
    for benchmark, row in results.rows:
        cells.setdefault((benchmark, row.plan.mode), []).append(row)
    for (benchmark, mode), rows in cells.items():
        cases = dict.fromkeys(row.plan.case.label for row in rows)
        if len(cases) >= MANY:
            base, heading = next(iter(benchmark.baselines.items()))
            others = [name for name in dict.fromkeys(row.provider for row in rows) if name != base]
            yield from (f"**`{benchmark.op}`, {mode.replace('_', ' ')} / {heading}**", "")
            yield f"| case | `{base}` | {' | '.join(f'`{name}`' for name in others)} |"
            yield f"|---|{'---:|' * (1 + len(others))}"
            at = {(row.plan.case.label, row.provider): row for row in rows}
            for case in cases:
                ratios = (_ratio_to(base, at.get((case, name))) for name in others)
                yield f"| {case} | {_cell(at.get((case, base)))} | {' | '.join(ratios)} |"
            yield ""


def _ratio_to(base: str, row: Row | None) -> str:
    return (_number(row.ratios.get(base), 2) if row else "") or "-"


def _reasons(title: str, found: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    if not found:
        return
    yield from (title, "")
    for (provider, why), labels in found.items():
        where = f" ({', '.join(dict.fromkeys(labels))})" if len(labels) < 4 else ""
        yield f"- `{provider}`: {why}{where}"
    yield ""


def _left_out(results: Results) -> Iterator[str]:
    if results.left_out:
        labels = ", ".join(f"`{label}`" for label in results.left_out)
        yield from (f"Left out, because the time was over ({len(results.left_out)}): {labels}", "")


def taken_under(under: Conditions) -> str:
    """The conditions of a run, as a sentence."""
    return (
        f"{under.device}; torch {under.torch}, Triton {under.triton}, PEFT {under.peft}; commit"
        f" {under.commit}, {under.timestamp}; `{under.command}`."
    )


def markdown(results: Results, under: Conditions) -> str:
    """The tables with the conditions they were taken under."""
    lines = [
        f"{taken_under(under)} Median of {under.repeats} interleaved"
        " rounds with p20 to p80; a ratio is the median of the ratios within a round.",
        "",
        *_goal_lines(results),
        *_overview(results),
        *_tables(results),
        *_left_out(results),
        *_reasons("Not measured:", results.missing),
        *_reasons("Refused, because the result is wrong:", results.wrong),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _color(benchmark: Benchmark, provider: str) -> str:
    if provider.startswith(OURS):
        return "tab:green"
    colors = dict(zip(benchmark.baselines, ("tab:gray", "tab:red"), strict=False))
    return colors.get(provider, "tab:blue")


def plot(path: Path, results: Results, under: Conditions) -> None:
    """One panel a case: each provider's ratio to the first baseline, or its bytes; shorter is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[Benchmark, str], list[Row]] = {}
    for benchmark, row in results.rows:
        if row.plan.plotted and benchmark.mode(row.plan.mode).plotted:
            panels.setdefault((benchmark, benchmark.label(row.plan)), []).append(row)
    several = len(_merged_benchmarks(results)) > 1
    columns = 2
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(13, 3.2 * lines), layout="constrained")
    for place, ((benchmark, label), rows) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        _panel(axes, label if several else label.removeprefix(f"{benchmark.op}/"), benchmark, rows)
    figure.suptitle(f"{under.device}, torch {under.torch}, PEFT {under.peft}, {under.timestamp}", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: Any, label: str, benchmark: Benchmark, rows: list[Row]) -> None:
    rows = rows[::-1]
    in_bytes = rows[0].bytes is not None
    base, heading = next(iter(benchmark.baselines.items()))
    values = [(row.bytes or 0) / 2**20 if in_bytes else row.ratios.get(base) or 0 for row in rows]
    colors = [_color(benchmark, row.provider) for row in rows]
    bars = axes.barh([row.provider for row in rows], values, color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("MiB" if in_bytes else f"time / {heading}'s", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12)
    if not in_bytes:
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")


@contextlib.contextmanager
def progress(total: int, stream=None) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else nothing. Yields ``advance(text, steps)``."""
    stream = stream or sys.stderr
    try:
        if not stream.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda text, steps: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*parts, console=Console(file=stream)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, steps: bar.update(task, description=text, advance=steps)
