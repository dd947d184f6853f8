"""Which way an op goes on the CPU in the ``cpp`` backend, by instruction set and class of shape.

``panels``  the extension's loops for the branch, which joins matrix products of its own (float32)
``vendor``  the extension's loops for the branch, around the vendor's products
``torch``   PyTorch's products throughout, those of the branch too

:func:`choose` is a pure function of what was measured on this processor (``lora-kernels tune --cpu``) and
of the defaults that ship. The extension has its answers as a table and looks a call up by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _settings
from ._messages import warn

# The orders of WAYS, OPS and of the bands are those of csrc/cpu/ways.h.
WAYS = ("panels", "vendor", "torch")
OPS = {
    "lora_linear": WAYS,
    "lora_linear_backward": WAYS,
    "lora_linear_dropped": WAYS,
    "lora_linear_dropped_backward": WAYS,
    "lora_linear_group": WAYS,
    "lora_linear_group_backward": WAYS,
    "lora_linear_group_dropped": WAYS,
    "lora_linear_group_dropped_backward": WAYS,
    "dora_linear": WAYS[:2],
    "dora_linear_backward": WAYS[:2],
    "quantized_linear": WAYS[:2],
}
FORMAT = "lora-kernels cpu 2"


@dataclass(frozen=True)
class Band:
    """A part of a range of sizes: those below a bound, and the size that is measured for all of them."""

    name: str
    below: int
    example: int


_ALL = 2**62
# Rows of x, elements of the weight (of the largest one of a group), and rank.
ROWS = (Band("few", 8, 1), Band("some", 128, 32), Band("many", _ALL, 512))
WEIGHTS = (Band("small", 2**16, 64**2), Band("medium", 2**20, 768**2), Band("large", _ALL, 2048**2))
RANKS = (Band("low", 33, 16), Band("middle", 129, 64), Band("high", _ALL, 256))
_BANDS = (ROWS, WEIGHTS, RANKS)
# "rows/weight/rank", in the order of the extension's table.
CLASSES = tuple("/".join(band.name for band in bands) for bands in itertools.product(*_BANDS))

# What ships gives way to what was measured faster than this share of its own time: medians of a busy
# machine lie further apart than that.
MARGIN = 0.95
# Microseconds by op, class and way.
Times = Mapping[str, Mapping[str, Mapping[str, float]]]


class Choice(NamedTuple):
    """A way, and why it was chosen."""

    way: str
    why: str


def shape_class(rows: int, weight: int, rank: int) -> str:
    """The class of a call, of those in :data:`CLASSES`."""
    sizes = zip(_BANDS, (rows, weight, rank), strict=True)
    return "/".join(next(band.name for band in bands if size < band.below) for bands, size in sizes)


def example(name: str) -> tuple[int, int, int, int]:
    """Rows, columns, outputs and rank of the shape that stands for a class."""
    bands = zip(_BANDS, name.split("/"), strict=True)
    rows, weight, rank = (next(b.example for b in some if b.name == part) for some, part in bands)
    return rows, math.isqrt(weight), math.isqrt(weight), rank


def choose(op: str, name: str, times: Times, instructions: str, vendor: str = "") -> Choice:
    """The way of ``op`` for the class ``name``: the fastest one measured where it gains, else what ships.

    Args:
        op: a key of :data:`OPS`.
        name: a class of :data:`CLASSES`.
        times: what was measured on this processor.
        instructions: ``avx512``, ``avx2``, ``sse2``, ``neon`` or any other.
        vendor: of the processor, as it calls itself.
    """
    measured = {way: us for way, us in times.get(op, {}).get(name, {}).items() if way in OPS[op]}
    ships = _default(op, name, instructions, vendor)
    if not measured:
        return Choice(ships, f"default for {instructions}")
    fastest = min(measured, key=measured.__getitem__)
    gains = measured[fastest] < MARGIN * measured.get(ships, math.inf)
    return Choice(fastest if gains else ships, "measured here")


def _default(op: str, name: str, instructions: str, vendor: str) -> str:
    """What ships: benchmarks/NOTES.md has the figures."""
    rows, weight, rank = name.split("/")
    if instructions in ("avx512", "avx2") and _ours(op, rows, weight, rank, vendor):
        return "panels"
    return "torch" if "torch" in OPS[op] and _torchs(op, rows, rank) else "vendor"


def _ours(op: str, rows: str, weight: str, rank: str, vendor: str) -> bool:
    """Whether our products are the fastest, as on AMD, which MKL serves less.

    A branch of high rank is a large product itself, and PyTorch's are as fast below large weights. Of small
    ones ours are faster everywhere (some rows), but there an adapter of B = 0 should change no bit of y.
    """
    wide = weight == "medium" and rank == "high" and "torch" in OPS[op] and not op.endswith("dropped")
    return vendor == "AuthenticAMD" and rows != "few" and weight != "small" and not wide


def _torchs(op: str, rows: str, rank: str) -> bool:
    """Whether PyTorch's products of the branch are as fast as our loops, or faster.

    Beyond low ranks a branch is a product like others, and in a forward pass its loops save nothing:
    they do where they read a dY that is in the cache once for two products, and where they drop x as they
    read it.
    """
    if rank == "high" or op in ("lora_linear", "lora_linear_group"):
        return True
    return (rank == "middle" or rows == "many") and "dropped" not in op


def decide(times: Times, forced: str, instructions: str, vendor: str) -> dict[str, dict[str, Choice]]:
    """Every op's way in every class; ``forced`` is ``auto`` or one way for all that have it."""
    if forced == "auto":
        return {op: {name: choose(op, name, times, instructions, vendor) for name in CLASSES} for op in OPS}
    ways = {op: forced if forced in can else "vendor" for op, can in OPS.items()}
    return {op: dict.fromkeys(CLASSES, Choice(way, f"forced to {forced}")) for op, way in ways.items()}


def force(name: str) -> None:
    """Sends every op one way from now on, in the whole process; ``auto`` is :func:`choose`'s.

    Raises:
        ValueError: the name is neither ``auto`` nor one of :data:`WAYS`.
        ImportError: there is no extension.
    """
    if name not in ("auto", *WAYS):
        expected = ", ".join(("auto", *WAYS))
        raise ValueError(f"LORA_KERNELS_CPU_PRODUCTS: expected one of {expected}, got {name!r}")
    global _forced
    _native().set_ways(bounds(), to_bytes(decide(remembered(), name, instruction_set(), maker())))
    _forced = name


_forced: str | None = None


def settle() -> None:
    """Follows the environment, and under ``auto`` what was measured; a way that is forced by now stays."""
    force(_forced or _settings.read().cpu_products)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """:func:`force` inside the ``with`` block, and what was before it after it."""
    before = _forced or _settings.read().cpu_products
    force(name)
    try:
        yield
    finally:
        force(before)


def now() -> dict[str, dict[str, Choice]]:
    """What the ops do in this process."""
    return decide(remembered(), _forced or "auto", instruction_set(), maker())


def bounds() -> tuple[int, ...]:
    """The upper bounds of every band but the last, as the extension takes them."""
    return tuple(band.below for bands in _BANDS for band in bands[:-1])


def to_bytes(choices: Mapping[str, Mapping[str, Choice]]) -> bytes:
    """The extension's table: a way's place for each class of each op."""
    return bytes(WAYS.index(choices[op][name].way) for op in OPS for name in CLASSES)


def _native() -> Any:
    return importlib.import_module("lora_kernels._C")


def instruction_set() -> str:
    """The instructions that the extension's loops use: ``avx512``, ``avx2``, ``sse2``, ``neon``, …"""
    with contextlib.suppress(ImportError, AttributeError):
        return str(_native().cpu_version())
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "sse2")


@functools.cache
def _cpuinfo() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in lines)
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def maker() -> str:
    """Who made the processor, as it calls itself; empty where it does not say."""
    return _cpuinfo().get("vendor_id", "")


def processor() -> str:
    """The processor's name, the instructions of the extension's loops and those of PyTorch."""
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {instruction_set()}, torch {torch.backends.cpu.get_cpu_capability()}"


def table() -> Path:
    """The file of what was measured."""
    return Path(_settings.read().plans).expanduser() / "cpu.json"


def remembered() -> Times:
    """What was measured on this processor."""
    return read(table())


def read(path: Path) -> Times:
    """The times in a file; none, with a warning if there is a file, where it is no sound table."""
    if not path.exists():
        return {}
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"{path} is left out, tune again: {error}")
        return {}


def parse(data: Any) -> Times:
    """The times in parsed JSON, none where they are another processor's.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no such table.
    """
    if data["format"] != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {data['format']!r}")
    times: Times = data["times"]
    for op, classes in times.items():
        for name, ways in classes.items():
            if op not in OPS or name not in CLASSES or not ways or not set(ways) <= set(WAYS):
                raise ValueError(f"times: no op, class or ways of ours in {op!r}, {name!r}: {sorted(ways)}")
            if not all(isinstance(us, (int, float)) and 0.0 < us < math.inf for us in ways.values()):
                raise ValueError(f"times: expected positive times, got {list(ways.values())}")
    return times if data["processor"] == processor() else {}


def to_text(times: Times) -> str:
    """What :func:`parse` reads."""
    made = f"lora-kernels tune --cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
    head = {"format": FORMAT, "processor": processor(), "made": f"{made}; medians, microseconds"}
    return json.dumps({**head, "times": times}, indent=1) + "\n"
