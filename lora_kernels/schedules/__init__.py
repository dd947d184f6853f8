"""Schedules: what happens between the steps of an optimiser, in a plain loop or under a Trainer."""

from __future__ import annotations

from .aflora import AFLoRAFreezer, aflora_fraction
from .autolora_rank import AutoLoRA
from .autolora_robust import MinAutoLR, TwoBranches, autolora_lambdas, pgd, two_branch_loss
from .base import Schedule
from .bilora import BiLoRA, hypergradient, orthogonality
from .callback import as_callback
from .delta_lora import DeltaLoRA
from .dylora import DyLoRASampler
from .hiddenkey import HiddenKey
from .lamda import LaMDAFreezer
from .explora import apply_explora, merge_and_restart
from .hiddenkey import HiddenKey
from .inflora import InfLoRA
from .lampat import adversarial_step
from .lisa import LISA
from .lorasc import LoRASC
from .plora import PeriodicLoRA
from .relora import ReLoRA, jagged_cosine
from .sora import SoRASchedule, gate_penalty

__all__ = [
    "LISA",
    "AFLoRAFreezer",
    "AutoLoRA",
    "BiLoRA",
    "DeltaLoRA",
    "DyLoRASampler",
    "HiddenKey",
    "LaMDAFreezer",
    "InfLoRA",
    "LoRASC",
    "MinAutoLR",
    "PeriodicLoRA",
    "ReLoRA",
    "Schedule",
    "SoRASchedule",
    "TwoBranches",
    "aflora_fraction",
    "adversarial_step",
    "apply_explora",
    "as_callback",
    "autolora_lambdas",
    "gate_penalty",
    "hypergradient",
    "jagged_cosine",
    "merge_and_restart",
    "orthogonality",
    "pgd",
    "two_branch_loss",
]
