"""PEFT's tuners beside LoRA whose layers compute with our ops: one file each; see :mod:`..peft`.

To add one, write its file, with ``TAKEOVERS`` in it. A tuner with no fused form that wins stays PEFT's, with
the reason in ``left.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import nn

from .base import Takeover
from .left import why_class_left


def _found() -> dict[type[nn.Module], Takeover]:
    files = (importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__))
    return {peft: one for file in files for peft, one in getattr(file, "TAKEOVERS", {}).items()}


# PEFT's class of a layer -> what takes it over.
TAKEOVERS = _found()


def why_left(layer: Any) -> str:
    """Why a layer that nothing here takes over stays PEFT's."""
    return why_class_left(next(one for one in type(layer).__mro__ if one.__module__.startswith("peft.")))
