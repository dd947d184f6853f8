"""Finds and loads the compiled extension ``lora_kernels._C`` once, and remembers why it is absent."""

from __future__ import annotations

import functools
import importlib
import logging

import torch

from . import _cpu_version, _cpu_ways, _ops, _settings
from ._messages import warn

logger = logging.getLogger(__name__)

# What came into the extension last.
NEWEST = f"{_ops.NAMESPACE}::cpp_cored_linear_autograd"


@functools.cache
def load() -> str | None:
    """Loads the extension. Returns ``None`` when it is loaded, else the reason why it is not."""
    reason = _load()
    logger.info("the extension is %s", "loaded" if reason is None else f"not loaded: {reason}")
    return reason


def _load() -> str | None:
    if _settings.read().skip_extension:
        return "LORA_KERNELS_SKIP_EXTENSION is set"
    try:
        native = importlib.import_module("lora_kernels._C")
    except ModuleNotFoundError:
        return "the extension was not built (no C++ compiler at install time)"
    except ImportError as error:
        return _rebuild(f"the extension does not load, rebuild it against this torch: {error}")
    try:
        _ = native.multi_lora
        if not torch._C._dispatch_has_kernel_for_dispatch_key(NEWEST, "CompositeImplicitAutograd"):
            raise AttributeError(f"there is no {NEWEST}")
        _cpu_version.settle()
        _cpu_ways.settle()
    except AttributeError as error:
        return _rebuild(f"the extension is of another version of this package, rebuild it: {error}")
    return None


def _rebuild(reason: str) -> str:
    """Somebody built it to have it: that it is not used has to show."""
    warn(reason)
    return reason


@functools.cache
def cuda_missing() -> str | None:
    """Why the loaded extension has no CUDA kernels, or ``None``."""
    op = f"{_ops.NAMESPACE}::cuda_{_ops.CUDA_OPS[0]}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        return None
    return "the extension was built without its CUDA kernels (no nvcc, or a torch without CUDA)"
