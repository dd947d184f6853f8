"""Which strategy computes an op of the Triton backend, and with which tiles.

:func:`choose` is a pure function of the problem and of tables of times. A table is a JSON file for one
card: what ``lora-kernels tune`` measured on the user's own, or what ships in ``plans/`` (predicted from
byte counts where nothing was measured, and it says which). An unknown card gets safe defaults.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _settings
from ._messages import warn

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", "beta", "kext", "single")
FORMAT = "lora-kernels plans 1"
SHIPPED = Path(__file__).parent / "plans"
# The passes whose tile a plan may change, and what of it.
_FIELDS = ("block_m", "block_c", "num_warps", "num_stages")
_GEMM_FIELDS = (*_FIELDS, "block_k", "group_m")
PASSES = {"forward": _FIELDS, "dy": _FIELDS, "x": _FIELDS, "gemm": _GEMM_FIELDS, "single": _GEMM_FIELDS}
# Rows up to which one launch that waits for the weight's bytes alone is right on any card.
_FEW_ROWS = 16
# A measured shape says nothing about one more than this factor away in any size.
_NEAR = 4.0
# A prediction that is closer than this says nothing, and beta has the vendor's GEMM.
_PREDICTION_MARGIN = 1.1
# Another process may have tuned: its table is looked for this often.
_LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class Problem:
    """All that a plan may depend on. ``card`` is ``sm_90``, ``gfx942``, …, or ``cpu`` when interpreting."""

    op: str
    rows: int
    cols: int
    out: int
    rank: int
    dtype: str
    card: str
    dropout: bool = False
    base: bool = True


@dataclass(frozen=True)
class Plan:
    """A strategy, and what is changed in the tiles of its passes: fields of ``kernels.config.Tile``
    by the pass's name (``forward``, ``dy``, ``x``, ``gemm``, ``single``).
    """

    strategy: str
    tile: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One problem and the microseconds of each plan that was tried on it."""

    problem: Problem
    times: tuple[tuple[Plan, float], ...]

    def best(self, margin: float = 1.0) -> Plan:
        """The fastest; the first of equals. Another strategy than beta must be ``margin`` times as fast."""

        def weighed(pair: tuple[Plan, float]) -> float:
            return pair[1] * (1.0 if pair[0].strategy == "beta" else margin)

        return min(self.times, key=weighed)[0]


@dataclass(frozen=True)
class Table:
    """The entries of one card. ``kind`` is ``measured`` or ``predicted``."""

    card: str
    kind: str
    entries: tuple[Entry, ...]


_active = "auto"
_looked = -math.inf
_seen: tuple[tuple[str, int], ...] = ()


@contextlib.contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Runs the Triton backend with one strategy inside the ``with`` block.

    Args:
        name: ``auto``, ``beta``, ``kext`` or ``single``.

    Raises:
        ValueError: the name is not a strategy.
    """
    global _active
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def plan(problem: Problem) -> Plan:
    """The strategy and the tiles for ``problem``: a dictionary look-up once a shape has been seen."""
    if _active != "auto":
        return Plan(_active)
    if time.monotonic() - _looked > _LOOK_EVERY_S:
        refresh()
    return _planned(problem)


@functools.lru_cache(maxsize=4096)
def _planned(problem: Problem) -> Plan:
    known = tables(problem.card)
    chosen = choose(problem, known)
    logger.info("%s: %s, by tables: %s", problem, chosen, ", ".join(one.kind for one in known) or "none")
    return chosen


def choose(problem: Problem, known: Iterable[Table] = ()) -> Plan:
    """The fastest plan of the nearest problem in the first table that has a near one, else the default.

    Where it was measured, never a plan that is slower there than another that was tried.
    """
    for table in known:
        distances = [_distance(problem, entry.problem) for entry in table.entries]
        nearest = min(distances, default=math.inf)
        if table.card == problem.card and nearest < math.inf:
            margin = 1.0 if table.kind == "measured" else _PREDICTION_MARGIN
            return table.entries[distances.index(nearest)].best(margin)
    few = problem.rows <= _FEW_ROWS and problem.rank <= 64
    if few and problem.op == "lora_linear" and problem.base and problem.card != "cpu":
        return Plan("single")
    return Plan("beta")


def _distance(problem: Problem, other: Problem) -> float:
    """Doublings between the sizes; infinite where one says nothing about the other."""
    widths = [name == "fp32" for name in (problem.dtype, other.dtype)]
    if (problem.op, problem.base) != (other.op, other.base) or widths[0] != widths[1]:
        return math.inf
    pairs = [(getattr(problem, n), getattr(other, n)) for n in ("rows", "cols", "out", "rank")]
    doublings = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs]
    if max(doublings) > math.log2(_NEAR):
        return math.inf
    unlike = 0.5 * (problem.dropout != other.dropout) + 0.25 * (problem.dtype != other.dtype)
    return sum(doublings) + unlike


def user_table(name: str) -> Path:
    """Where ``tune`` writes, and the planner looks first, for a card."""
    return Path(_settings.read().plans).expanduser() / f"{name}.json"


@functools.cache
def tables(name: str) -> tuple[Table, ...]:
    """The user's table of a card and the one that ships, those that there are and that are sound."""
    found = (read(path, name) for path in (user_table(name), SHIPPED / f"{name}.json"))
    return tuple(table for table in found if table is not None)


def refresh() -> None:
    """Forgets the plans made so far if a table has changed since."""
    global _looked, _seen
    _looked = time.monotonic()
    folder = user_table("any").parent
    now = tuple((str(path), path.stat().st_mtime_ns) for path in sorted(folder.glob("*.json")))
    if now != _seen:
        _seen = now
        tables.cache_clear()
        _planned.cache_clear()


def read(path: Path, name: str) -> Table | None:
    """The table in a file, or ``None`` with one warning where it is not one for this card."""
    try:
        return parse(json.loads(path.read_text()), name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if not isinstance(error, KeyError) else f"{error} is missing"
        warn(f"{path}: not a table of plans for {name} ({reason}); going on without it")
        return None


def parse(data: Any, name: str) -> Table:
    """A table from parsed JSON.

    Raises:
        ValueError, TypeError, KeyError: it is not a table for the card ``name``.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {data.get('format')!r}")
    if data["card"] != name:
        raise ValueError(f"card: expected {name!r}, got {data['card']!r}")
    if data["kind"] not in ("measured", "predicted"):
        raise ValueError(f"kind: expected measured or predicted, got {data['kind']!r}")
    return Table(name, data["kind"], tuple(_parse_entry(entry, name) for entry in data["entries"]))


def _parse_entry(entry: Any, name: str) -> Entry:
    problem = Problem(**entry["problem"], card=name)
    sizes = (problem.rows, problem.cols, problem.out, problem.rank)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"problem: expected positive sizes, got {sizes}")
    times = tuple((_parse_plan(tried), float(tried["us"])) for tried in entry["tried"])
    if not times or not all(0.0 < us < math.inf for _, us in times):
        raise ValueError(f"tried: expected positive times, got {[us for _, us in times]}")
    return Entry(problem, times)


def _parse_plan(tried: Mapping[str, Any]) -> Plan:
    strategy, tile = tried["strategy"], tried.get("tile", {})
    if strategy not in STRATEGIES[1:]:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES[1:])}, got {strategy!r}")
    for part, changes in tile.items():
        for key, value in changes.items():
            good = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            good = good or (key == "num_stages" and isinstance(value, int) and 0 < value < 9)
            small = key.startswith("block_") and isinstance(value, int) and value < 16
            if key not in PASSES.get(part, ()) or not good or small:
                raise ValueError(f"tile: {part}.{key} = {value!r} is nothing that a plan can change")
    return Plan(strategy, tile)


def to_text(table: Table, made: str) -> str:
    """The table as JSON that :func:`parse` takes, an entry a line; ``made`` says how it came to be."""
    head = {"format": FORMAT, "card": table.card, "kind": table.kind, "made": made}
    entries = ",\n  ".join(json.dumps(_entry_json(entry)) for entry in table.entries)
    return json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n  {entries}\n ]\n}}\n'


def _entry_json(entry: Entry) -> dict[str, Any]:
    problem = {key: value for key, value in asdict(entry.problem).items() if key != "card"}
    tried = [
        {"strategy": plan.strategy, **({"tile": dict(plan.tile)} if plan.tile else {}), "us": round(us, 2)}
        for plan, us in entry.times
    ]
    return {"problem": problem, "tried": tried}


def card(device: torch.device) -> str:
    """The name under which tables know a device."""
    return _cuda_card(device.index or 0) if device.type == "cuda" else device.type


@functools.cache
def _cuda_card(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
