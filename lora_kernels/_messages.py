"""What the package tells its user beside results: warnings, and progress where a terminal shows it.

A warning wants something done, and points at the user's own line. What is merely worth knowing goes to
``logging.getLogger(__name__)`` of its module; all of them are below ``lora_kernels``, silent unless asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import torch

T = TypeVar("T")
_INSIDE = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))

logging.getLogger(__package__).addHandler(logging.NullHandler())


def warn(text: str) -> None:
    """A UserWarning at the innermost line that is neither this package's nor torch's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, stacklevel=depth + 1)


def each(what: str, items: Iterable[T]) -> Iterator[T]:
    """The items, with a bar of how many are done."""
    with progress(what, len(items) if isinstance(items, Sized) else None) as tick:
        for item in items:
            yield item
            tick()


@contextlib.contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[], object]]:
    """What to call after each of ``total`` steps. A bar by tqdm or one line, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _lines(what, total)
        return
    with tqdm(total=total, desc=what, leave=False, delay=1.0, dynamic_ncols=True) as bar:
        yield bar.update


def _lines(what: str, total: int | None) -> Iterator[Callable[[], object]]:
    done, of = 0, "" if total is None else f"/{total}"

    def tick() -> None:
        nonlocal done
        done += 1
        print(f"\r{what}: {done}{of}", end="", file=sys.stderr, flush=True)

    try:
        yield tick
    finally:
        print(file=sys.stderr)
