"""Who multiplies float32 matrices in the ``cpp`` backend: the extension's own loops, or the vendor's GEMM.

``auto`` is what ``lora-kernels tune --cpu`` measured on this processor. Where nothing was measured it is
the loops on AMD processors with AVX-512, on which they were found faster, and the vendor's GEMM elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import _settings

# The order is that of csrc/cpu/products.h.
MULTIPLIERS = ("auto", "panels", "vendor")
FORMAT = "lora-kernels cpu 1"


def _native() -> Any:
    return importlib.import_module("lora_kernels._C")


def multiply_by(name: str) -> None:
    """Chooses who multiplies from now on, in the whole process.

    Raises:
        ValueError: the name is not one of :data:`MULTIPLIERS`.
        ImportError: there is no extension.
    """
    if name not in MULTIPLIERS:
        raise ValueError(f"LORA_KERNELS_CPU_PRODUCTS: expected one of {', '.join(MULTIPLIERS)}, got {name!r}")
    _native().multiply_by(MULTIPLIERS.index(name))


def settle() -> None:
    """Chooses what the environment says, or what was measured."""
    chosen = _settings.read().cpu_products
    multiply_by(remembered() or chosen if chosen == "auto" else chosen)


@contextlib.contextmanager
def multiplied_by(name: str) -> Iterator[None]:
    """:func:`multiply_by` inside the ``with`` block, and :func:`settle` after it."""
    multiply_by(name)
    try:
        yield
    finally:
        settle()


def automatic() -> str:
    """What ``auto`` is on this processor."""
    return remembered() or ("panels" if _native().panels_are_faster() else "vendor")


@functools.cache
def processor() -> str:
    """The processor's name and the vectors that torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def table() -> Path:
    """The file of what was measured."""
    return Path(_settings.read().plans).expanduser() / "cpu.json"


def remembered() -> str | None:
    """Who was measured to be the faster one on this processor, or ``None``."""
    path = table()
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT or data["products"] not in MULTIPLIERS[1:]:
            raise ValueError(f"expected {FORMAT!r} and one of {', '.join(MULTIPLIERS[1:])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is left out, tune again: {error}", stacklevel=2)
        return None
    return data["products"] if data.get("processor") == processor() else None


def to_text(products: str, ratios: Mapping[str, float]) -> str:
    """What :func:`remembered` reads; ``ratios`` are panels / vendor by shape, for the reader."""
    made = f"lora-kernels tune --cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
    head = {"format": FORMAT, "processor": processor(), "products": products, "made": made}
    return json.dumps({**head, "panels / vendor": dict(ratios)}, indent=1) + "\n"
