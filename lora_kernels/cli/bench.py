"""``lora-kernels bench``: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options: all of them belong to ``python -m benchmarks``."""
    parser.add_argument("options", nargs=argparse.REMAINDER, help="as for python -m benchmarks")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmarks; returns 1 where the current folder has none."""
    sys.path.insert(0, "")
    if importlib.util.find_spec("benchmarks") is None:
        print("bench: the benchmarks are part of the source checkout; run this from its root folder")
        return 1
    sys.argv = ["benchmarks", *args.options]
    runpy.run_module("benchmarks", run_name="__main__")
    return 0
