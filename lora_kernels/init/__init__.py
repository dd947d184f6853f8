"""How adapters start: pure functions of a site, by the name in ``LoRAConfig(init_lora_weights=…)``."""

from __future__ import annotations

from . import asym, corda, eva, loftq, lora_ga, mica, milora, olora, orthogonal, pissa, random
from .base import GIVEN, INITIALISERS, Drawn, Initialiser, draw, find, register

__all__ = [
    "GIVEN",
    "INITIALISERS",
    "Drawn",
    "Initialiser",
    "asym",
    "corda",
    "draw",
    "eva",
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
