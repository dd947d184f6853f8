"""Adapter methods: one file each, every one a parametrisation of the same primitive."""

from __future__ import annotations

from . import variants as variants  # which register themselves
from .base import METHODS, Adapter, class_of, make, place, register
from .call import Call, current_call
from .config import LoRAConfig
from .lora import LoRA
from .low_rank.dora import DoRA
from .low_rank.dylora import DyLoRA
from .low_rank.lora_fa import LoRAFA
from .low_rank.lora_xs import LoRAXS
from .low_rank.sora import SoRA
from .peft_form import PeftForm
from .site import Site, Start
from .update import (
    Added,
    Branched,
    Dense,
    Input,
    LowRank,
    Replaced,
    Routed,
    Shifted,
    Update,
    apply_update,
    apply_updates,
    merge_update,
    stack,
)

__all__ = [
    "METHODS",
    "Adapter",
    "Added",
    "Branched",
    "Call",
    "Dense",
    "DoRA",
    "DyLoRA",
    "Input",
    "LoRA",
    "LoRAConfig",
    "LoRAFA",
    "LoRAXS",
    "LowRank",
    "PeftForm",
    "Replaced",
    "Routed",
    "Shifted",
    "Site",
    "SoRA",
    "Start",
    "Update",
    "apply_update",
    "apply_updates",
    "class_of",
    "current_call",
    "make",
    "merge_update",
    "place",
    "register",
    "stack",
]
