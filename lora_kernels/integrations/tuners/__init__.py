"""PEFT's tuners beside LoRA whose layers compute with our ops: one file each; see :mod:`..peft`.

To add one, write its file and give it a line in ``_FILES``. A tuner with no fused form that wins
stays PEFT's, with the reason in ``LEFT``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import (
    delora,
    fourierft,
    gralora,
    hira,
    hra,
    loha,
    lokr,
    miss,
    psoft,
    tinylora,
    unilora,
    vblora,
    vera,
)
from .base import Takeover

_FILES = (
    vera,
    vblora,
    delora,
    gralora,
    miss,
    tinylora,
    unilora,
    psoft,
    hira,
    loha,
    lokr,
    fourierft,
    hra,
)

# PEFT's class of a layer -> what takes it over.
TAKEOVERS: dict[type[nn.Module], Takeover] = {
    peft: takeover for file in _FILES for peft, takeover in file.TAKEOVERS.items()
}

# The last part of a tuner's module below `peft.tuners` -> why its layers stay PEFT's.
LEFT: dict[str, str] = {}


def why_left(layer: Any) -> str:
    """Why a layer that nothing here takes over stays PEFT's."""
    kind = next(one for one in type(layer).__mro__ if one.__module__.startswith("peft."))
    tuner = kind.__module__.split(".")[2]
    return LEFT.get(tuner, f"{kind.__module__}.{kind.__name__} has no fused form")
