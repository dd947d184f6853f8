"""Adapter methods: one file each, every one a parametrisation of the same primitive."""

from __future__ import annotations

from .base import METHODS, Adapter, Factors, make, register
from .config import LoRAConfig
from .dora import DoRA
from .dylora import DyLoRA
from .lora import LoRA
from .lora_fa import LoRAFA
from .lora_xs import LoRAXS
from .sora import SoRA

__all__ = [
    "METHODS",
    "Adapter",
    "DoRA",
    "DyLoRA",
    "Factors",
    "LoRA",
    "LoRAConfig",
    "LoRAFA",
    "LoRAXS",
    "SoRA",
    "make",
    "register",
]
