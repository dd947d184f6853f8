"""Schedules: what happens between the steps of an optimiser, in a plain loop or under a Trainer."""

from __future__ import annotations

from .base import Schedule
from .callback import as_callback
from .delta_lora import DeltaLoRA
from .lisa import LISA
from .lorasc import LoRASC
from .plora import PeriodicLoRA
from .relora import ReLoRA, jagged_cosine

__all__ = [
    "LISA",
    "DeltaLoRA",
    "LoRASC",
    "PeriodicLoRA",
    "ReLoRA",
    "Schedule",
    "as_callback",
    "jagged_cosine",
]
