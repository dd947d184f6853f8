"""How adapters start: pure functions of a site, by the name in ``LoRAConfig(init_lora_weights=…)``."""

from __future__ import annotations

from . import (
    asym,
    clusters,
    corda,
    eva,
    expressive,
    loftq,
    lora_ga,
    mica,
    milora,
    olora,
    orthogonal,
    pissa,
    random,
)
from .base import GIVEN, INITIALISERS, Drawn, Initialiser, draw, find, register
from .expressive import expressive_adapters, expressive_bound, expressive_network, expressive_rank

__all__ = [
    "GIVEN",
    "INITIALISERS",
    "Drawn",
    "Initialiser",
    "asym",
    "clusters",
    "corda",
    "draw",
    "eva",
    "expressive",
    "expressive_adapters",
    "expressive_bound",
    "expressive_network",
    "expressive_rank",
    "find",
    "loftq",
    "lora_ga",
    "mica",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "random",
    "register",
]
