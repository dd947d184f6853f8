"""Schedules: what happens between the steps of an optimiser, in a plain loop or under a Trainer."""

from __future__ import annotations

from .adalora import AdaLoRA, adalora_penalty
from .aflora import AFLoRAFreezer, aflora_fraction
from .autolora_rank import AutoLoRA
from .autolora_robust import MinAutoLR, TwoBranches, autolora_lambdas, pgd, two_branch_loss
from .base import Schedule
from .bilora import BiLoRA, hypergradient, orthogonality
from .callback import as_callback
from .compact import compact
from .delta_lora import DeltaLoRA
from .dylora import DyLoRASampler
from .explora import apply_explora, merge_and_restart
from .hiddenkey import HiddenKey
from .inflora import InfLoRA
from .lamda import LaMDAFreezer
from .lampat import adversarial_step
from .lisa import LISA
from .lorasc import LoRASC
from .plora import PeriodicLoRA
from .prilora import PRILoRA, linear_ranks
from .rank_adaptor import Profile, search_ranks
from .relora import ReLoRA, jagged_cosine
from .roselora import RoseLoRA
from .sora import SoRASchedule, gate_penalty

__all__ = [
    "LISA",
    "AFLoRAFreezer",
    "AdaLoRA",
    "AutoLoRA",
    "BiLoRA",
    "DeltaLoRA",
    "DyLoRASampler",
    "HiddenKey",
    "InfLoRA",
    "LaMDAFreezer",
    "LoRASC",
    "MinAutoLR",
    "PRILoRA",
    "PeriodicLoRA",
    "Profile",
    "ReLoRA",
    "RoseLoRA",
    "Schedule",
    "SoRASchedule",
    "TwoBranches",
    "adalora_penalty",
    "adversarial_step",
    "aflora_fraction",
    "apply_explora",
    "as_callback",
    "autolora_lambdas",
    "compact",
    "gate_penalty",
    "hypergradient",
    "jagged_cosine",
    "linear_ranks",
    "merge_and_restart",
    "orthogonality",
    "pgd",
    "search_ranks",
    "two_branch_loss",
]
