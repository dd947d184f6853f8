"""What samples say of a model: statistics of its layers, gathered in one pass."""

from __future__ import annotations

from .calibration import COLLECTED, Statistics, calibrate
from .laplace import LaplaceLoRA
from .reslora import estimate_reslora_merge
from .select import energy_ranks, select_blocks, select_neurons

__all__ = [
    "COLLECTED",
    "LaplaceLoRA",
    "Statistics",
    "calibrate",
    "energy_ranks",
    "estimate_reslora_merge",
    "select_blocks",
    "select_neurons",
]
