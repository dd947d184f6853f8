"""Schedules: what happens between the steps of an optimiser, in a plain loop or under a Trainer."""

from __future__ import annotations

from .autolora_rank import AutoLoRA
from .autolora_robust import MinAutoLR, TwoBranches, autolora_lambdas, pgd, two_branch_loss
from .base import Schedule
from .bilora import BiLoRA, hypergradient, orthogonality
from .callback import as_callback
from .delta_lora import DeltaLoRA
from .hiddenkey import HiddenKey
from .lisa import LISA
from .lorasc import LoRASC
from .plora import PeriodicLoRA
from .relora import ReLoRA, jagged_cosine

__all__ = [
    "LISA",
    "AutoLoRA",
    "BiLoRA",
    "DeltaLoRA",
    "HiddenKey",
    "LoRASC",
    "MinAutoLR",
    "PeriodicLoRA",
    "ReLoRA",
    "Schedule",
    "TwoBranches",
    "as_callback",
    "autolora_lambdas",
    "hypergradient",
    "jagged_cosine",
    "orthogonality",
    "pgd",
    "two_branch_loss",
]
