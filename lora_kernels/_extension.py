"""Finds and loads the compiled extension ``lora_kernels._C`` once, and remembers why it is absent."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

import torch

from . import _ops, _settings

# Who multiplies float32 matrices in the `cpp` backend; the order is that of csrc/cpu/products.h.
MULTIPLIERS = ("auto", "panels", "vendor")


@functools.cache
def load() -> str | None:
    """Loads the extension. Returns ``None`` when it is loaded, else the reason why it is not."""
    if _settings.read().skip_extension:
        return "LORA_KERNELS_SKIP_EXTENSION is set"
    try:
        multiply_by(_settings.read().cpu_products)
    except ModuleNotFoundError:
        return "the extension was not built (no C++ compiler at install time)"
    except ImportError as error:
        return f"the extension does not load, rebuild it against this torch: {error}"
    return None


def multiply_by(name: str) -> None:
    """Chooses who multiplies from now on, in the whole process.

    Raises:
        ValueError: the name is not one of :data:`MULTIPLIERS`.
        ImportError: there is no extension.
    """
    if name not in MULTIPLIERS:
        raise ValueError(f"LORA_KERNELS_CPU_PRODUCTS: expected one of {', '.join(MULTIPLIERS)}, got {name!r}")
    importlib.import_module("lora_kernels._C").multiply_by(MULTIPLIERS.index(name))


@contextlib.contextmanager
def multiplied_by(name: str) -> Iterator[None]:
    """:func:`multiply_by` inside the ``with`` block, and what the environment says after it."""
    multiply_by(name)
    try:
        yield
    finally:
        multiply_by(_settings.read().cpu_products)


def panels_are_faster() -> bool:
    """Whether ``auto`` multiplies by the extension's own loops on this processor."""
    return load() is None and importlib.import_module("lora_kernels._C").panels_are_faster()


@functools.cache
def cuda_missing() -> str | None:
    """Why the loaded extension has no CUDA kernels, or ``None``."""
    op = f"{_ops.NAMESPACE}::cuda_{_ops.CUDA_OPS[0]}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        return None
    return "the extension was built without its CUDA kernels (no nvcc, or a torch without CUDA)"
