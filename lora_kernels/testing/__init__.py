"""Input makers and assertions, shipped: the tests and the benchmarks of this package use them.

Importing this module imports nothing else; its names load when they are first read.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "assert_close": "assertions",
    "error_of": "assertions",
    "LoraCase": "inputs",
    "TENSORS": "inputs",
    "leaves": "inputs",
    "lora_inputs": "inputs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
