"""Which strategy computes an op of the Triton backend, and with which tile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

STRATEGIES = ("auto", "beta", "kext", "single")


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


_active = "auto"


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
    """The strategy and the tile for ``problem``."""
    return Plan("beta" if _active == "auto" else _active)


def card(device: torch.device) -> str:
    """The name under which tables know a device."""
    return _cuda_card(device.index or 0) if device.type == "cuda" else device.type


@functools.cache
def _cuda_card(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
