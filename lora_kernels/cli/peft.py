"""``lora-kernels peft``: which layers of PEFT's tuners ``accelerate`` takes over."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._made import between


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--write", action="store_true", help="write docs/peft.md and the README's table")


def run(args: argparse.Namespace) -> int:
    """Prints the page, or writes it."""
    from ..integrations import support  # not at the top: it imports PEFT, which may not be there

    if not args.write:
        print(support.page(), end="")
        return 0
    root = Path(__file__).parents[2]
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "peft.md").write_text(support.page(), encoding="utf-8")
    readme = root / "README.md"
    written = between(readme.read_text(encoding="utf-8"), support.BEGIN, support.table(), support.END)
    readme.write_text(written, encoding="utf-8")
    return 0
