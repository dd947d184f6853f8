"""Schedules: what happens between the steps of an optimiser, in a plain loop or under a Trainer."""

from __future__ import annotations

from .adalora import AdaLoRA, adalora_penalty
from .advlora import advlora_loss
from .aflora import AFLoRAFreezer, aflora_fraction
from .alora_alloc import ALoRAAllocator
from .autolora_rank import AutoLoRA
from .autolora_robust import MinAutoLR, TwoBranches, autolora_lambdas, pgd, two_branch_loss
from .base import Schedule
from .bilora import BiLoRA, hypergradient, orthogonality
from .blora import BLoRA, bit_operations, blora_gate_loss
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
from .lonas_search import (
    Group,
    SubNetwork,
    draw_sizes,
    middle_sizes,
    multiplications,
    search_subnetworks,
    slices_of,
)
from .lorasc import LoRASC
from .plora import PeriodicLoRA
from .prilora import PRILoRA, linear_ranks
from .rank_adaptor import Profile, search_ranks
from .rank_warmup import RankWarmup, shrink_rank
from .relora import ReLoRA, jagged_cosine
from .roselora import RoseLoRA
from .sora import SoRASchedule, gate_penalty
from .tensor_rank_reduction import RankReducer

__all__ = [
    "LISA",
    "AFLoRAFreezer",
    "ALoRAAllocator",
    "AdaLoRA",
    "AutoLoRA",
    "BLoRA",
    "BiLoRA",
    "DeltaLoRA",
    "DyLoRASampler",
    "Group",
    "HiddenKey",
    "InfLoRA",
    "LaMDAFreezer",
    "LoRASC",
    "MinAutoLR",
    "PRILoRA",
    "PeriodicLoRA",
    "Profile",
    "RankReducer",
    "RankWarmup",
    "ReLoRA",
    "RoseLoRA",
    "Schedule",
    "SoRASchedule",
    "SubNetwork",
    "TwoBranches",
    "adalora_penalty",
    "adversarial_step",
    "advlora_loss",
    "aflora_fraction",
    "apply_explora",
    "as_callback",
    "autolora_lambdas",
    "bit_operations",
    "blora_gate_loss",
    "compact",
    "draw_sizes",
    "gate_penalty",
    "hypergradient",
    "jagged_cosine",
    "linear_ranks",
    "merge_and_restart",
    "middle_sizes",
    "multiplications",
    "orthogonality",
    "pgd",
    "search_ranks",
    "search_subnetworks",
    "shrink_rank",
    "slices_of",
    "two_branch_loss",
]
