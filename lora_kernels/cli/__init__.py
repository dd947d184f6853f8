"""The command line: ``lora-kernels`` or ``python -m lora_kernels.cli``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Each module has add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "env": "versions, backends, and why each is on or off",
    "demo": "fine-tune a pretrained encoder with LoRA, check it against PEFT, time it",
    "inspect": "what the assembler made of every kernel, with no card needed",
    "tune": "measure the strategies on your card and shapes; the fastest runs from then on",
    "methods": "the methods of the literature that are here, with paper, file and state",
    "peft": "PEFT's tuners, and which of their layers accelerate() takes over",
    "bench": "the benchmarks, from a checkout",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Fused kernels for LoRA in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f".{name}", __name__)
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if rest and not getattr(args, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return importlib.import_module(f".{args.command}", __name__).run(args)
