"""Results as CSV, as a markdown table and as a plot; and a progress bar where someone watches."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .bench_lora_linear import BYTES, OP, OVERHEAD, TIMED, Plan, Results, Row
from .providers import FROZEN, PEFT

COLUMNS = (
    *("op", "provider", "mode", "shape", "dtype", "rank", "dropout"),
    *("median_us", "p20_us", "p80_us", "bytes", "ratio_frozen", "ratio_peft"),
    *("device", "torch", "triton", "peft", "commit", "command", "timestamp"),
)
OURS = "ours"


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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def conditions(device: str, command: str, timestamp: str, repeats: int) -> Conditions:
    return Conditions(
        device_name(device),
        torch.__version__,
        version("triton"),
        version("peft"),
        commit(),
        command,
        timestamp,
        torch.get_num_threads(),
        repeats,
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def csv_row(row: Row, under: Conditions) -> dict[str, object]:
    """One line of the CSV; times in microseconds."""
    case, time = row.plan.case, row.time
    times = (time.median, time.p20, time.p80) if time else (None,) * 3
    values: Iterable[object] = (
        *(OP, row.provider, row.plan.mode, case.shape, case.dtype_name, case.rank, f"{case.dropout_p:g}"),
        *(_number(value, 2) for value in times),
        "" if row.bytes is None else row.bytes,
        *(_number(row.ratio_frozen, 4), _number(row.ratio_peft, 4)),
        *(under.device, under.torch, under.triton, under.peft, under.commit, under.command, under.timestamp),
    )
    return dict(zip(COLUMNS, values, strict=True))


def write_csv(path: Path, results: Results, under: Conditions) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_row(row, under) for row in results.rows)


@dataclass(frozen=True)
class Goal:
    """A figure to reach: the ``ratio`` of ``provider`` in one cell of the table."""

    text: str
    mode: str
    shape: str
    dropout: float
    ratio: str
    limit: float
    provider: str = "ours_module"
    other: str | None = None


# The bytes are compared with PEFT's on CUDA, where its dropout keeps one byte an element, not two.
GOALS = (
    Goal("fwd+bwd, fp32, / frozen", "both", "512x2048x2048", 0.0, "ratio_frozen", 1.05),
    Goal("fwd+bwd, fp32, dropout 0.1, / frozen", "both", "512x2048x2048", 0.1, "ratio_frozen", 1.15),
    Goal("per call, fwd+bwd, / PEFT", "overhead", "1x64x64", 0.0, "ratio_peft", 0.65),
    Goal(
        "bytes saved, bf16, dropout 0.1, / PEFT with a byte mask",
        *("saved_bytes", "8192x4096x4096", 0.1, "ratio_peft", 0.72),
        other="peft_byte_mask",
    ),
)


def reached(goal: Goal, rows: Iterable[Row]) -> float | None:
    """The figure of ``goal`` among ``rows``, or ``None`` where it was not measured."""
    here = {
        row.provider: row
        for row in rows
        if (row.plan.mode, row.plan.case.shape, row.plan.case.dropout_p)
        == (goal.mode, goal.shape, goal.dropout)
        and row.plan.case.device == "cpu"
    }
    row = here.get(goal.provider)
    if row is None:
        return None
    if goal.other is None:
        return getattr(row, goal.ratio)
    other = here.get(goal.other)
    return row.bytes / other.bytes if other and other.bytes and row.bytes is not None else None


def _goal_lines(results: Results) -> Iterator[str]:
    found = [(goal, reached(goal, results.rows)) for goal in GOALS]
    if all(value is None for _, value in found):
        return
    yield from ("| figure | shape | at most | measured |", "|---|---|---:|---:|")
    for goal, value in found:
        if value is not None:
            mark = "" if value <= goal.limit else " (missed)"
            yield f"| `{goal.provider}`, {goal.text} | {goal.shape} | {goal.limit:.2f} | {value:.3f}{mark} |"
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


def _table(rows: list[Row], modes: list[str]) -> Iterator[str]:
    """Providers down; for each mode the figure and its ratios to frozen and to PEFT."""
    cells = {(row.provider, row.plan.mode): row for row in rows}
    heads = [f"{mode.replace('_', ' ')} | / frozen | / PEFT" for mode in modes]
    yield f"| provider | {' | '.join(heads)} |"
    yield f"|---|{'---:|---:|---:|' * len(modes)}"
    for provider in dict.fromkeys(row.provider for row in rows):
        line = []
        for mode in modes:
            row = cells.get((provider, mode))
            ratios = (row.ratio_frozen, row.ratio_peft) if row else (None, None)
            line += [_cell(row), *(_number(ratio, 2) or "-" for ratio in ratios)]
        yield f"| `{provider}` | {' | '.join(line)} |"
    yield ""


def _groups(rows: Iterable[Row]) -> dict[tuple[str, tuple[str, ...]], list[Row]]:
    """Rows of one table: one case, and modes of one kind."""
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        kind = next(kind for kind in (TIMED, OVERHEAD, BYTES) if row.plan.mode in kind)
        groups.setdefault((row.plan.case.label, kind), []).append(row)
    return groups


def _reasons(title: str, found: dict[tuple[str, str], list[Plan]]) -> Iterator[str]:
    if not found:
        return
    yield from (title, "")
    for (provider, why), plans in found.items():
        where = ", ".join(dict.fromkeys(f"{p.case.shape} p={p.case.dropout_p:g} {p.mode}" for p in plans))
        yield f"- `{provider}`: {why} ({where})" if len(plans) < 4 else f"- `{provider}`: {why}"
    yield ""


def markdown(results: Results, under: Conditions) -> str:
    """The tables with the conditions they were taken under."""
    lines = [
        f"{under.device}; torch {under.torch}, Triton {under.triton}, PEFT {under.peft}; commit"
        f" {under.commit}, {under.timestamp}; `{under.command}`. Median of {under.repeats} interleaved"
        " rounds with p20 to p80; a ratio is the median of the ratios within a round.",
        "",
        *_goal_lines(results),
    ]
    for (label, kind), rows in _groups(results.rows).items():
        shape, dtype, rank, dropout = label.split("/")
        lines += [f"**{shape}, {dtype}, r={rank[1:]}, dropout {dropout[1:]}**", ""]
        lines += _table(rows, [mode for mode in kind if any(row.plan.mode == mode for row in rows)])
    lines += _reasons("Not measured:", results.missing)
    lines += _reasons("Refused, because the result is wrong:", results.wrong)
    return "\n".join(lines).rstrip() + "\n"


def _color(provider: str) -> str:
    if provider.startswith(OURS):
        return "tab:green"
    return {FROZEN: "tab:gray", PEFT: "tab:red"}.get(provider, "tab:blue")


def plot(path: Path, results: Results, under: Conditions) -> None:
    """One panel a case: each provider's ratio to the frozen layer, or its bytes; shorter is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in results.rows if row.plan.mode in ("both", "overhead", *BYTES)]
    panels: dict[str, list[Row]] = {}
    for row in shown:
        panels.setdefault(row.plan.label.removeprefix(f"{OP}/"), []).append(row)
    columns = 2
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(13, 3.2 * lines), layout="constrained")
    for place, (label, rows) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(lines, columns, place), label, rows)
    figure.suptitle(f"{under.device}, torch {under.torch}, PEFT {under.peft}, {under.timestamp}", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes, label: str, rows: list[Row]) -> None:
    rows = rows[::-1]
    in_bytes = rows[0].bytes is not None
    values = [(row.bytes or 0) / 2**20 if in_bytes else row.ratio_frozen or 0 for row in rows]
    bars = axes.barh([row.provider for row in rows], values, color=[_color(row.provider) for row in rows])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("MiB" if in_bytes else "time / frozen nn.Linear's", fontsize=8)
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
