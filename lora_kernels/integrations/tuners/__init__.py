"""PEFT's tuners beside LoRA whose layers compute with our ops: one file each; see :mod:`..peft`.

To add one, write its file and give it a line in ``_FILES``. A tuner with no fused form that wins
stays PEFT's, with the reason in ``left.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import (
    adalora,
    delora,
    fourierft,
    gralora,
    hira,
    hra,
    loha,
    lokr,
    miss,
    osf,
    peanut,
    psoft,
    pvera,
    randlora,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)
from .base import Takeover
from .left import why_class_left

_FILES = (
    adalora,
    vera,
    vblora,
    delora,
    gralora,
    miss,
    tinylora,
    unilora,
    psoft,
    pvera,
    randlora,
    osf,
    hira,
    loha,
    lokr,
    fourierft,
    hra,
    peanut,
    waveft,
)

# PEFT's class of a layer -> what takes it over.
TAKEOVERS: dict[type[nn.Module], Takeover] = {
    peft: takeover for file in _FILES for peft, takeover in file.TAKEOVERS.items()
}


def why_left(layer: Any) -> str:
    """Why a layer that nothing here takes over stays PEFT's."""
    return why_class_left(next(one for one in type(layer).__mro__ if one.__module__.startswith("peft.")))
