"""``python -m benchmarks``: measures, checks, and writes CSV, a markdown table and a plot."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import report
from .measure import Bench, Results
from .suites import DEFAULT, Benchmark, Plan, benchmarks, file_stem, suites

REPEATS, QUICK_REPEATS = 40, 5
KEEP_SECONDS = 30.0
Todo = list[tuple[Benchmark, Plan]]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument("--suite", metavar="NAME", default=DEFAULT, help="what to measure (default: default)")
    result.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    result.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does it run at all?")
    result.add_argument(
        "--filter",
        metavar="REGEX",
        default="",
        help="only what matches in OP/CASE/MODE/PROVIDER, where the case of lora_linear is"
        " SHAPE/DTYPE/rRANK/pDROPOUT; a benchmark's baselines are always measured beside it",
    )
    result.add_argument("--repeats", type=int, help=f"rounds (default {REPEATS}, {QUICK_REPEATS} if quick)")
    result.add_argument(
        "--budget-seconds",
        type=float,
        metavar="S",
        help="start nothing new after so many seconds; what was left out is listed, the least important first"
        " to go",
    )
    result.add_argument(
        "--rival-path",
        metavar="DIR",
        action="append",
        default=[],
        help="a checkout of a rival (of LoRAFusion, say) to import it from; may be given again",
    )
    result.add_argument("--threads", type=int, help="CPU threads of torch")
    result.add_argument("--output", type=Path, help="folder (default: benchmarks/results, none if quick)")
    result.add_argument("--label", metavar="NAME", help="a part of the files' names, say a processor's: epyc")
    return result


def wanted_by(pattern: str) -> Callable[[str], bool]:
    """Whether a label, OP/CASE/MODE/PROVIDER, was asked for.

    Raises:
        ValueError: the pattern is not a regular expression.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--filter: expected a regular expression, got {pattern!r}: {error}") from None
    return lambda label: search(label) is not None


def selected(suite: str, device: str, quick: bool, wanted: Callable[[str], bool]) -> Todo:
    """The plans of a suite for which any provider is asked for.

    Raises:
        ValueError: there is no such suite, it has no plans for this device, or nothing is asked for.
    """
    known = benchmarks()
    if suite not in suites(known):
        raise ValueError(f"--suite: expected one of {', '.join(suites(known))}, got {suite!r}")
    plans = [(one, plan) for one in known if suite in one.plans for plan in one.plans[suite](device, quick)]
    if not plans:
        raise ValueError(f"--device: expected one that suite {suite!r} has plans for, got {device}")
    asked = [
        (one, plan)
        for one, plan in plans
        if any(one.runs(plan, p.name) and wanted(one.label(plan, p.name)) for p in one.providers)
    ]
    return sorted(asked, key=lambda pair: pair[1].priority)


def execute(
    bench: Bench, todo: Todo, budget: float | None = None, keep: Callable[[], object] = lambda: None
) -> None:
    """Runs the plans in their order; after ``budget`` seconds none is started.

    ``keep`` is called now and then, so that a run which is cut off has left something.
    """
    start = kept = time.monotonic()
    with report.progress(len(todo) * bench.repeats) as advance:
        for benchmark, plan in todo:
            label = benchmark.label(plan)
            if budget is not None and time.monotonic() - start > budget:
                bench.results.left_out.append(label)
                continue
            left = bench.repeats

            def after_round(label: str = label) -> None:
                nonlocal left
                left -= 1
                advance(label, 1)

            advance(label, 0)
            bench.run(benchmark, plan, after_round)
            advance(label, left)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the graphs' memory, before the next plan asks for its own
            if time.monotonic() - kept > KEEP_SECONDS:
                keep()
                kept = time.monotonic()


class Output:
    """The result files of one run."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem

    def tables(self, results: Results, under: report.Conditions) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        report.write_csv(self.folder / f"{self.stem}.csv", results, under)
        (self.folder / f"{self.stem}.md").write_text(report.markdown(results, under))

    def plot(self, results: Results, under: report.Conditions) -> None:
        try:
            report.plot(self.folder / f"{self.stem}.png", results, under)
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a provider was refused for a wrong result, or 2 for bad arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sys.path.extend(args.rival_path)
    try:
        wanted = wanted_by(args.filter)
        todo = selected(args.suite, device, args.quick, wanted)
        _check_arguments(args, device, todo)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.repeats or (QUICK_REPEATS if args.quick else REPEATS), wanted)
    command = " ".join([*report.limits(), shlex.join(["python", "-m", "benchmarks", *given])])
    under = report.conditions(device, command, bench.repeats)
    folder = args.output or (None if args.quick else Path(__file__).parent / "results")
    output = None if folder is None else Output(folder, _stem(args.suite, device, args.label))
    execute(bench, todo, args.budget_seconds, lambda: output.tables(bench.results, under) if output else None)
    if output is not None:
        output.tables(bench.results, under)
        output.plot(bench.results, under)
    print(report.markdown(bench.results, under), end="")
    return 1 if bench.results.wrong else 0


def _stem(suite: str, device: str, label: str | None = None) -> str:
    """The files' name: figures of a processor that is held to fewer instructions have files of their own."""
    less = report.limited() if device == "cpu" else None
    return "-".join(part for part in (file_stem(suite, device), label, less) if part)


def _check_arguments(args: argparse.Namespace, device: str, todo: Todo) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that is here, got cuda, and torch sees none")
    if args.budget_seconds is not None and args.budget_seconds <= 0:
        raise ValueError(f"--budget-seconds: expected more than 0, got {args.budget_seconds:g}")
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {args.repeats}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.label is not None and not re.fullmatch(r"\w+", args.label):
        raise ValueError(f"--label: expected letters and digits, got {args.label!r}")
    if not todo:
        raise ValueError(f"--filter: expected a match in at least one benchmark, got {args.filter!r}")


if __name__ == "__main__":
    sys.exit(main())
