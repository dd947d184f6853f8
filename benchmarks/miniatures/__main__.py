"""``python -m benchmarks.miniatures``: runs what each method promises, and writes results/methods.md."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lora_kernels import methods

from .. import report
from . import SEEDS, WITHIN, Outcome, keys, outcome, table

RESULT = Path(__file__).parents[1] / "results" / "methods.md"
HEAD = """# What the methods promise, shown small

Each line is one module of `benchmarks/miniatures/`; seconds are of the three seeds together.
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.miniatures", description=__doc__)
    result.add_argument("--only", nargs="+", metavar="KEY", help="these methods; nothing is written then")
    return result


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where one failed to run, or 2 for bad arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    only = parser().parse_args(given).only
    unknown = sorted({*(only or ())} - {*keys()})
    if unknown:
        print(f"--only: expected some of {', '.join(keys())}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "benchmarks.miniatures", *given])
    under = report.conditions("cpu", command, len(SEEDS))
    outcomes: list[Outcome] = []
    for key in only or keys():
        print(f"{key} …", file=sys.stderr)
        outcomes.append(outcome(key))
        if not only:  # each time, so that a run which is cut off has left something
            RESULT.write_text(page(outcomes, under), encoding="utf-8")
    print(page(outcomes, under), end="")
    return int(any(one.error for one in outcomes))


def page(outcomes: list[Outcome], under: report.Conditions) -> str:
    """The table, and who is not in it."""
    left_out = {*keys()} - {one.key for one in outcomes}
    without = {one.key for one in methods.REGISTER} - {*keys(), *WITHIN}
    within = [f"`{one}` with `{other}`" for one, other in WITHIN.items()]
    rest = [f"\nShown with another: {', '.join(within)}."]
    for words, some in (("Without a miniature", without), ("Not run", left_out)):
        rest += [f"\n{words}: {', '.join(f'`{key}`' for key in sorted(some))}."] if some else []
    return "\n".join([HEAD, report.taken_under(under), "", *table(outcomes), *rest]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
