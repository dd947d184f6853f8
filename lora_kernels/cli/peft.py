"""``lora-kernels peft``: which layers of PEFT's tuners ``accelerate`` takes over."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--write", action="store_true", help="write docs/peft.md")


def run(args: argparse.Namespace) -> int:
    """Prints the page, or writes it."""
    from ..integrations.support import page  # not at the top: it imports PEFT, which may not be there

    if not args.write:
        print(page(), end="")
        return 0
    docs = Path(__file__).parents[2] / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "peft.md").write_text(page(), encoding="utf-8")
    return 0
