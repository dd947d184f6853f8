"""What samples say of a model: statistics of its layers, gathered in one pass."""

from __future__ import annotations

from .calibration import COLLECTED, Statistics, calibrate

__all__ = ["COLLECTED", "Statistics", "calibrate"]
