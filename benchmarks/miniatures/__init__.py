"""What each method promises, shown small: one module a method, seconds of CPU each.

A miniature joins with one module ``miniatures/<key of the register>.py``, which defines

    CLAIM = "what the paper promises, in the figures of this miniature"
    def run(seed: int) -> dict[str, float]: ...                # the figures of one seed
    def holds(figures: list[dict[str, float]]) -> bool: ...    # whether those of all seeds bear CLAIM out

Those whose figures do not bear the claim out are listed so. A method that acts in another's miniature is in
``WITHIN`` instead.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

SEEDS = (0, 1, 2)
# Method -> the one whose miniature shows it too.
WITHIN = {
    "select_blocks": "smt",
    "select_neurons": "neft",
    "lamda_freezer": "lamda",
    "aflora_freezer": "aflora",
    "dylora_sampler": "dylora",
    "sora_schedule": "sora",
}


class Outcome(NamedTuple):
    """The figures of one miniature, by seed, or why there are none."""

    key: str
    claim: str
    figures: tuple[dict[str, float], ...] = ()
    holds: bool = False
    seconds: float = 0.0
    error: str | None = None


def keys() -> list[str]:
    """The methods that have a miniature."""
    return sorted(one.name for one in pkgutil.iter_modules(__path__) if not one.name.startswith("_"))


def outcome(key: str, seeds: Iterable[int] = SEEDS) -> Outcome:
    """Runs one miniature; one that fails says why, and the others go on."""
    module = importlib.import_module(f".{key}", __name__)
    start = time.perf_counter()
    try:
        figures = []
        for seed in seeds:
            torch.manual_seed(seed)
            figures.append(module.run(seed))
        held = bool(module.holds(figures))
    except Exception as error:
        return Outcome(key, module.CLAIM, error=f"{type(error).__name__}: {error}")
    return Outcome(key, module.CLAIM, tuple(figures), held, time.perf_counter() - start)


def table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A line a miniature: what was claimed, each figure by seed, and whether the claim holds."""
    yield from ("| method | claim | figures, by seed | holds | s |", "|---|---|---|---|---:|")
    for one in outcomes:
        state = "yes" if one.holds else "**no**"
        cells = (f"`{one.key}`", one.claim, one.error or _figures(one.figures), state, f"{one.seconds:.1f}")
        yield f"| {' | '.join(cells)} |"


def _figures(figures: tuple[dict[str, float], ...]) -> str:
    names = dict.fromkeys(name for one in figures for name in one)
    return "; ".join(f"{name}: {', '.join(f'{one[name]:.4g}' for one in figures)}" for name in names)
