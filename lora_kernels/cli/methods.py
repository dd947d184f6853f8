"""``lora-kernels methods``: what there is of the literature, with paper, file and state."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..methods import KINDS, REGISTER, listing, table
from ._made import between

BEGIN, END = "<!-- methods: made by `lora-kernels methods --write` -->\n", "<!-- end of methods -->\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--write", action="store_true", help="write docs/methods.md and the README's table")


def with_table(readme: str) -> str:
    """The README with its table of methods made anew."""
    return between(readme, BEGIN, table(), END)


def run(args: argparse.Namespace) -> int:
    """Prints the register, or writes what is made of it."""
    if args.write:
        root = Path(__file__).parents[2]
        readme = root / "README.md"
        (root / "docs").mkdir(exist_ok=True)
        (root / "docs" / "methods.md").write_text(listing(), encoding="utf-8")
        readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for one in REGISTER:
        if args.kind in (None, one.kind):
            state = "" if one.verified else "  (unverified)"
            rows = ",".join(map(str, one.rows)) or "-"
            print(f"{one.key:<20} {one.kind:<10} {rows:<8} {one.arxiv:<12} {one.file:<40} {one.title}{state}")
    return 0
