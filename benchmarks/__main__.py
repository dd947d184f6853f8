"""``python -m benchmarks``: measures, checks, and writes CSV, a markdown table and a plot."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
from pathlib import Path

import torch

from . import report
from .bench_lora_linear import Bench, Plan, plans
from .providers import PROVIDERS

REPEATS, QUICK_REPEATS = 40, 5


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    result.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does it run at all?")
    result.add_argument(
        "--filter",
        metavar="REGEX",
        default="",
        help="only what matches in OP/SHAPE/DTYPE/rRANK/pDROPOUT/MODE/PROVIDER; the baselines frozen and"
        " peft are always measured beside it",
    )
    result.add_argument("--repeats", type=int, help=f"rounds (default {REPEATS}, {QUICK_REPEATS} if quick)")
    result.add_argument("--threads", type=int, help="CPU threads of torch")
    result.add_argument("--output", type=Path, help="folder (default: benchmarks/results, none if quick)")
    return result


def wanted_by(pattern: str):
    """Whether a provider's figure was asked for.

    Raises:
        ValueError: the pattern is not a regular expression.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--filter: expected a regular expression, got {pattern!r}: {error}") from None
    return lambda plan, provider: search(f"{plan.label}/{provider}") is not None


def selected(device: str, quick: bool, wanted) -> list[Plan]:
    return [plan for plan in plans(device, quick) if any(wanted(plan, p.name) for p in PROVIDERS)]


def execute(bench: Bench, todo: list[Plan]) -> None:
    with report.progress(len(todo) * bench.repeats) as advance:
        for plan in todo:
            left = bench.repeats

            def after_round(label: str = plan.label) -> None:
                nonlocal left
                left -= 1
                advance(label, 1)

            advance(plan.label, 0)
            bench.run(plan, after_round)
            advance(plan.label, left)


def write(folder: Path, device: str, bench: Bench, under: report.Conditions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(folder / f"{device}.csv", bench.results, under)
    (folder / f"{device}.md").write_text(report.markdown(bench.results, under))
    try:
        report.plot(folder / f"{device}.png", bench.results, under)
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a provider was refused for a wrong result, or 2 for bad arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = wanted_by(args.filter)
        todo = selected(device, args.quick, wanted)
        _check_arguments(args, device, todo)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.repeats or (QUICK_REPEATS if args.quick else REPEATS), wanted)
    execute(bench, todo)
    command = shlex.join(["python", "-m", "benchmarks", *given])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes").removesuffix("+00:00")
    under = report.conditions(device, command, f"{now}Z", bench.repeats)
    folder = args.output or (None if args.quick else Path(__file__).parent / "results")
    if folder is not None:
        write(folder, device, bench, under)
    print(report.markdown(bench.results, under), end="")
    return 1 if bench.results.wrong else 0


def _check_arguments(args: argparse.Namespace, device: str, todo: list[Plan]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that is here, got cuda, and torch sees none")
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {args.repeats}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if not todo:
        raise ValueError(f"--filter: expected a match in at least one benchmark, got {args.filter!r}")


if __name__ == "__main__":
    sys.exit(main())
