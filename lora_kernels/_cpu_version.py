"""Which instructions the loops of the ``cpp`` backend use: each is compiled for several sets of them."""

from __future__ import annotations

import importlib

from . import _settings


def settle() -> None:
    """Chooses what the environment says.

    Raises:
        ValueError: this processor does not have it.
    """
    native = importlib.import_module("lora_kernels._C")
    versions = runnable()
    chosen = _settings.read().cpu_version
    if chosen not in ("auto", *versions):
        expected = f"expected auto or what this processor has, {', '.join(versions)}"
        raise ValueError(f"LORA_KERNELS_CPU_VERSION: {expected}, got {chosen!r}")
    native.use_cpu_version(0 if chosen == "auto" else versions.index(chosen))


def runnable() -> tuple[str, ...]:
    """The sets that this processor has, the widest first."""
    versions: tuple[str, ...] = importlib.import_module("lora_kernels._C").cpu_versions()
    return versions
