"""What samples say of a model: statistics of its layers, gathered in one pass."""

from __future__ import annotations

from .calibration import COLLECTED, Statistics, calibrate
from .reslora import estimate_reslora_merge

__all__ = ["COLLECTED", "Statistics", "calibrate", "estimate_reslora_merge"]
