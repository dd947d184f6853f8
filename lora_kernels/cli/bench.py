"""``lora-kernels bench``: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no option: what is given goes to ``python -m benchmarks`` as it stands."""
    parser.usage = "lora-kernels bench [options of python -m benchmarks]"
    parser.set_defaults(passes_on=True)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks; returns 1 where the current folder has none."""
    sys.path.insert(0, "")
    if importlib.util.find_spec("benchmarks") is None:
        print("bench: the benchmarks are part of the source checkout; run this from its root folder")
        return 1
    sys.argv = ["benchmarks", *args.rest]
    runpy.run_module("benchmarks", run_name="__main__")
    return 0
